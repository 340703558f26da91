// SPDX-License-Identifier: Apache-2.0
// The control socket: good requests, garbage, what is too long, clients that are slow or leave.
#include "recovery/supervisor/control_server.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <thread>
#include <vector>

using namespace tandem;
using nlohmann::json;

namespace {

/// A server on a thread of its own. "echo" answers at once, "later" from the loop, "twice" twice, "never" never.
class Server {
 public:
  Server() {
    std::string pattern = "/tmp/tandem-control-XXXXXX";
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    directory_ = pattern;
    auto loop = EventLoop::make();
    REQUIRE(loop.has_value());
    loop_.emplace(std::move(*loop));
    auto server = ControlServer::listen(
        path(), *loop_, [this](const json& request, const ControlServer::Answer& answer) { handle(request, answer); });
    INFO((server ? std::string{} : server.error().text));
    REQUIRE(server.has_value());
    server_ = std::move(*server);
    thread_ = std::thread([this] { loop_->run(); });
  }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;
  ~Server() {
    static_cast<void>(ask("{\"command\": \"quit\"}\n"));
    thread_.join();
    server_.reset();
    std::filesystem::remove_all(directory_);
  }
  [[nodiscard]] std::string path() const { return directory_ + "/control.sock"; }

  [[nodiscard]] UniqueFd connect() const {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path().copy(address.sun_path, sizeof address.sun_path - 1);
    UniqueFd socket{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) return {};
    return socket;
  }
  [[nodiscard]] json ask(const std::string& text) const {
    const UniqueFd socket = connect();
    send_all(socket.get(), text);
    return answer(socket.get());
  }
  /// Empty if the server closes without one.
  static json answer(int socket) {
    std::string received;
    char buffer[4096];
    for (;;) {
      pollfd wait{socket, POLLIN, 0};
      if (::poll(&wait, 1, 20'000) != 1) return "nothing came";
      const ssize_t got = ::recv(socket, buffer, sizeof buffer, 0);
      if (got <= 0) break;
      received.append(buffer, static_cast<std::size_t>(got));
    }
    return json::parse(received, nullptr, false);
  }
  static void send_all(int socket, const std::string& text) {
    for (std::size_t sent = 0; sent < text.size();) {
      const ssize_t count = ::send(socket, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
      if (count <= 0) return;
      sent += static_cast<std::size_t>(count);
    }
  }

 private:
  void handle(const json& request, const ControlServer::Answer& answer) {
    const std::string command = request["command"];
    if (command == "echo") answer({{"ok", true}, {"echo", request["text"]}});
    if (command == "big") answer({{"ok", true}, {"text", std::string(3 << 20, 'x')}});
    if (command == "twice") answer({{"ok", true}, {"n", 1}}), answer({{"ok", true}, {"n", 2}});
    if (command == "later") later_ = loop_->soon([answer] { answer({{"ok", true}, {"late", true}}); });
    if (command == "bytes") answer({{"ok", true}, {"text", "a\xff\xed\xa0\x80z"}});
    if (command == "quit") answer({{"ok", true}}), loop_->quit();
  }
  std::string directory_;
  std::optional<EventLoop> loop_;
  EventLoop::Source later_;
  std::unique_ptr<ControlServer> server_;
  std::thread thread_;
};

}  // namespace

TEST_CASE("requests and answers") {
  const Server server;
  CHECK(server.ask("{\"command\": \"echo\", \"text\": \"hello\"}\n")["echo"] == "hello");
  CHECK(server.ask("{\"command\": \"later\"}\n")["late"] == true);
  CHECK(server.ask("{\"command\": \"twice\"}\n")["n"] == 1);
  CHECK(server.ask("{\"command\": \"big\"}\n")["text"].get<std::string>().size() == 3 << 20);
  // What follows the first line does not matter.
  CHECK(server.ask("{\"command\": \"echo\", \"text\": 1}\n{\"command\": \"echo\", \"text\": 2}\n")["echo"] == 1);
  // A request in pieces.
  const UniqueFd socket = server.connect();
  for (const char* piece : {"{\"comm", "and\": \"echo\",", " \"text\": 3}", "\n"})
    Server::send_all(socket.get(), piece);
  CHECK(Server::answer(socket.get())["echo"] == 3);
}

TEST_CASE("an answer with bytes that are no UTF-8 is an answer all the same") {
  const Server server;
  const std::string text = server.ask("{\"command\": \"bytes\"}\n")["text"];
  CHECK(text.front() == 'a');
  CHECK(text.back() == 'z');
}

TEST_CASE("garbage is refused with a sentence") {
  const Server server;
  for (const char* text :
       {"\n", "garbage\n", "[]\n", "{}\n", "{\"command\": 5}\n", "{\"command\": null}\n", "{\"command\": \"echo\"\n",
        "\"command\"\n", "{\"command\": \"\xff\xfe\"}\n", "\x01\x02\x03\n"}) {
    INFO(text);
    const json answer = server.ask(text);
    REQUIRE(answer.is_object());
    CHECK(answer["ok"] == false);
    CHECK(answer["error"].get<std::string>().size() > 10);
  }
  std::string nested(100'000, '[');
  CHECK(server.ask(nested + "\n")["ok"] == false);
  CHECK(server.ask("{\"command\": \"echo\", \"text\": 1}\n")["echo"] == 1);
}

TEST_CASE("a request without end is cut off") {
  const Server server;
  const UniqueFd socket = server.connect();
  Server::send_all(socket.get(), std::string(9 << 20, ' '));
  // Refused, or cut off while it still talks.
  const json answer = Server::answer(socket.get());
  if (answer.is_object()) CHECK(answer["ok"] == false);
  CHECK(answer != "nothing came");
  CHECK(server.ask("{\"command\": \"echo\", \"text\": 1}\n")["echo"] == 1);
}

TEST_CASE("clients that say nothing, or leave, or do not read, keep nobody waiting") {
  const Server server;
  std::vector<UniqueFd> silent;
  for (int n = 0; n < 20; ++n) silent.push_back(server.connect());
  Server::send_all(silent[0].get(), "{\"command\": ");
  Server::send_all(silent[1].get(), "{\"command\": \"never\"}\n");
  for (int n = 0; n < 50; ++n) {
    const UniqueFd leaving = server.connect();
    if (n % 2 == 0)
      Server::send_all(leaving.get(), n % 4 == 0 ? "{\"command\": \"big\"}\n" : "{\"command\": \"later\"}\n");
  }
  CHECK(server.ask("{\"command\": \"echo\", \"text\": 1}\n")["echo"] == 1);
  // Beyond its limit the server turns clients away at once, and serves again when others have left.
  for (int n = 0; n < 64; ++n) silent.push_back(server.connect());
  CHECK(Server::answer(silent.back().get()).is_discarded());
  silent.clear();
  json answer;
  for (int n = 0; n < 1000 && !answer.is_object(); ++n) answer = server.ask("{\"command\": \"echo\", \"text\": 1}\n");
  REQUIRE(answer.is_object());
  CHECK(answer["echo"] == 1);
}

TEST_CASE("the control socket is root's and its group's, and replaces a stale one") {
  Server server;
  struct stat status {};
  REQUIRE(::stat(server.path().c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0660);
  auto loop = EventLoop::make();
  REQUIRE(loop.has_value());
  const std::string path = server.path() + "2";
  { REQUIRE(listen_unix(path, 0600).has_value()); }
  CHECK(std::filesystem::exists(path));  // stale now
  CHECK(ControlServer::listen(path, *loop, [](const json&, const ControlServer::Answer&) {}).has_value());
  CHECK_FALSE(std::filesystem::exists(path));
  CHECK_FALSE(listen_unix(path + std::string(120, 'x'), 0600).has_value());
  CHECK_FALSE(listen_unix("/nonexistent/socket", 0600).has_value());
}
