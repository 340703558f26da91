// SPDX-License-Identifier: Apache-2.0
// A blocking client for tandemd's control socket.
#include "recovery/cli/client.hpp"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include <cstring>

#include "common/unique_fd.hpp"

namespace tandem {

Result<nlohmann::json> ask_tandemd(const std::string& socket_path, const nlohmann::json& request, int limit_seconds) {
  const std::string doing = "ask tandemd at " + socket_path;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket_path.size() >= sizeof address.sun_path) return fail(ErrorKind::kInvalid, doing + ": path too long");
  std::memcpy(address.sun_path, socket_path.c_str(), socket_path.size() + 1);
  const UniqueFd socket{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  if (!socket) return fail_errno(doing);
  const timeval limit{limit_seconds, 0};
  ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return fail_errno(
        doing, errno == EACCES ? "run this as root" : "is tandemd running? Start it with: systemctl start tandemd");
  // libvirt's XML is UTF-8; if it ever is not, the option's parser shall say so, not an exception here.
  const std::string text = request.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  for (std::size_t sent = 0; sent < text.size();) {
    const ssize_t count = ::send(socket.get(), text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fail_errno(doing);
    sent += static_cast<std::size_t>(count);
  }
  std::string received;
  while (received.empty() || received.back() != '\n') {
    char buffer[16 * 1024];
    const ssize_t count = ::recv(socket.get(), buffer, sizeof buffer, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN)
      return fail(ErrorKind::kSystem,
                  doing + ": no answer within " + std::to_string(limit_seconds) + " s; see its log");
    if (count < 0) return fail_errno(doing);
    if (count == 0) return fail(ErrorKind::kGone, doing + ": it closed the connection without an answer; see its log");
    received.append(buffer, static_cast<std::size_t>(count));
  }
  auto answer = nlohmann::json::parse(received, nullptr, /*allow_exceptions=*/false);
  if (!answer.is_object()) return fail(ErrorKind::kInvalid, doing + ": the answer is not JSON");
  if (!answer.value("ok", false)) return fail(ErrorKind::kInvalid, answer.value("error", "refused without a reason"));
  return answer;
}

}  // namespace tandem
