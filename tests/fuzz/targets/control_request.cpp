// SPDX-License-Identifier: Apache-2.0
// The control socket, and behind it what tandemd does with a hook's request: an operator's bytes in, one line of JSON
// out. Input: what the client writes, in pieces of the length that each piece's first byte says.
#include <sys/socket.h>
#include <sys/un.h>

#include <string>

#include "recovery/supervisor/control_server.hpp"
#include "tests/fuzz/targets/input.hpp"
#include "vmm/domain_option.hpp"

using namespace tandem;
using namespace tandem::fuzz;

namespace {

// As Supervisor::on_request() and on_hook() answer what they refuse.
void handle(const nlohmann::json& request, const ControlServer::Answer& answer) {
  const auto text_of = [&](const char* key) {
    const auto found = request.find(key);
    return found != request.end() && found->is_string() ? found->get<std::string>() : std::string{};
  };
  const std::string command = text_of("command");
  if (command != "hook") return answer(refusal("unknown command \"" + command + "\""));
  const auto domain = parse_domain_option(text_of("xml"), "/run/tandem");
  if (!domain) return answer(refusal(domain.error().text));
  if (domain->nics.empty()) return answer({{"ok", true}});
  static_cast<void>(nlohmann::json({domain->name, domain->uuid}).dump());  // throws if they are no UTF-8
  nlohmann::json nics = nlohmann::json::array();
  for (const NicOption& nic : domain->nics) nics.push_back({{"mac", nic.mac}, {"pair", nic.pair}});
  answer({{"ok", true}, {"domain", domain->name}, {"nics", nics}});
}

class World {
 public:
  World() : path_("/tmp/tandem-fuzz-control-" + std::to_string(::getpid())) {
    auto loop = EventLoop::make();
    must_hold(loop.has_value(), "an event loop can be made");
    loop_.emplace(std::move(*loop));
    auto server = ControlServer::listen(path_, *loop_, handle);
    must_hold(server.has_value(), "a socket can be made");
    server_ = std::move(*server);
  }
  ~World() { server_.reset(); }

  [[nodiscard]] UniqueFd connect() const {
    UniqueFd socket{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.c_str(), path_.size() + 1);
    must_hold(::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0,
              "a client can connect");
    return socket;
  }
  void settle() {
    while (loop_->step()) {
    }
  }

 private:
  std::string path_;
  std::optional<EventLoop> loop_;
  std::unique_ptr<ControlServer> server_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static World world;
  const DescriptorCheck all_closed;
  Input input(data, size);
  UniqueFd client = world.connect();
  std::string said;
  while (!input.empty()) {
    const std::uint8_t length = input.u8();
    const auto piece = input.take(length == 0xff ? 4096 : length);
    if (piece.empty()) continue;
    if (::send(client.get(), piece.data(), piece.size(), MSG_NOSIGNAL) < 0) break;  // it has had its answer
    said.append(reinterpret_cast<const char*>(piece.data()), piece.size());
    world.settle();
  }
  std::string reply(1 << 20, '\0');
  const ssize_t got = ::recv(client.get(), reply.data(), reply.size(), 0);
  if (said.find('\n') != std::string::npos) {
    must_hold(got > 1, "a whole line is answered");
    reply.resize(static_cast<std::size_t>(got));
    must_hold(reply.find('\n') == reply.size() - 1, "the answer is one line");
    const auto parsed = nlohmann::json::parse(reply, nullptr, false);
    must_hold(parsed.is_object() && parsed.contains("ok"), "the answer is a JSON object that says whether it is well");
  } else {
    must_hold(got < 0, "nothing is said before the line is whole");
  }
  client.reset();
  world.settle();
  return 0;
}
