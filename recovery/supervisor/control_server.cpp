// SPDX-License-Identifier: Apache-2.0
// Unix-socket server for one-line JSON requests.
#include "recovery/supervisor/control_server.hpp"

#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

namespace tandem {

namespace {

using namespace std::chrono_literals;

constexpr std::size_t kLongestRequest = 8 * 1024 * 1024;  // a domain's XML fits many times over
constexpr std::size_t kMostClients = 64;
constexpr auto kRequestLimit = 10s;

}  // namespace

Result<UniqueFd> listen_unix(const std::string& path, unsigned mode, int user, int group) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path)
    return fail(ErrorKind::kInvalid,
                "listen on " + path + ": the path is longer than a socket's may be; shorten run_dir");
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  UniqueFd socket{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  if (!socket) return fail_errno("listen on " + path);
  ::unlink(path.c_str());
  const mode_t before = ::umask(0777);  // nobody connects before mode and owner are right
  const int bound = ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  ::umask(before);
  if (bound != 0) return fail_errno("listen on " + path, "check that its directory exists and is writable");
  if (::chown(path.c_str(), static_cast<uid_t>(user), static_cast<gid_t>(group)) != 0 ||
      ::chmod(path.c_str(), mode) != 0 || ::listen(socket.get(), 16) != 0)
    return fail_errno("listen on " + path);
  return socket;
}

Result<std::unique_ptr<ControlServer>> ControlServer::listen(const std::string& path, EventLoop& loop,
                                                             Handler handler) {
  std::unique_ptr<ControlServer> server{new ControlServer(path, loop, std::move(handler))};
  auto socket = listen_unix(path, 0660);
  if (!socket) return tl::make_unexpected(std::move(socket.error()));
  server->socket_ = std::move(*socket);
  auto accepting = loop.watch(server->socket_.get(), [raw = server.get()] { raw->on_connection(); });
  if (!accepting) return tl::make_unexpected(std::move(accepting.error()));
  server->accepting_ = std::move(*accepting);
  return server;
}

ControlServer::~ControlServer() {
  *alive_ = false;
  ::unlink(path_.c_str());
}

void ControlServer::on_connection() {
  UniqueFd socket{::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)};
  if (!socket || clients_.size() >= kMostClients) return;
  const std::uint64_t id = next_id_++;
  Client& client = clients_[id];
  client.socket = std::move(socket);
  auto readable = loop_.watch(client.socket.get(), [this, id] { on_readable(id); });
  if (!readable) {
    clients_.erase(id);
    return;
  }
  client.readable = std::move(*readable);
  client.limit = loop_.after(kRequestLimit, [this, id] { clients_.erase(id); });
}

void ControlServer::on_readable(std::uint64_t id) {
  Client& client = clients_.at(id);
  char buffer[16 * 1024];
  const ssize_t got = ::recv(client.socket.get(), buffer, sizeof buffer, 0);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) {
    clients_.erase(id);
    return;
  }
  client.received.append(buffer, static_cast<std::size_t>(got));
  const std::size_t end = client.received.find('\n');
  if (end == std::string::npos) {
    if (client.received.size() > kLongestRequest) answer(id, refusal("read request: longer than 8 MiB"));
    return;
  }
  client.limit.reset();
  // From here on readable means "the client left": whatever it says after its request does not matter.
  client.readable.reset();
  const auto request = nlohmann::json::parse(client.received.substr(0, end), nullptr, /*allow_exceptions=*/false);
  if (!request.is_object() || !request.contains("command") || !request["command"].is_string())
    return answer(id, refusal("read request: not a JSON object with a \"command\""));
  handler_(request, [this, id, alive = alive_](const nlohmann::json& reply) {
    if (*alive) answer(id, reply);
  });
}

void ControlServer::answer(std::uint64_t id, const nlohmann::json& reply) {
  const auto found = clients_.find(id);
  if (found == clients_.end()) return;
  // Names come from elsewhere (a domain's XML may spell what is no UTF-8): those bytes are replaced, dump() would
  // throw.
  const std::string text = reply.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  // Blocking with a limit would be worse than losing a client that does not read: its buffer takes 200 KiB.
  const int buffer = static_cast<int>(text.size()) + 4096;
  ::setsockopt(found->second.socket.get(), SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer);
  if (::send(found->second.socket.get(), text.data(), text.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(text.size()))
    spdlog::warn("answer a client: it left or does not read");
  clients_.erase(found);
}

}  // namespace tandem
