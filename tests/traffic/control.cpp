// SPDX-License-Identifier: Apache-2.0
// Lines of JSON over a stream socket.
#include "tests/traffic/control.hpp"

#include "tests/traffic/net.hpp"

namespace tandem::traffic {

namespace {
constexpr std::size_t kMaxLine = 64 << 10;
}

Result<Json> ControlConnection::receive() {
  // Byte by byte: requests are rare, and raw records may follow right behind a line.
  std::string line;
  for (char next = 0; receive_all(socket_.get(), &next, 1);) {
    if (next == '\n') {
      Json object = Json::parse(line, nullptr, false);
      if (!object.is_object())
        return fail(ErrorKind::kInvalid, "control connection: '" + line + "' is not a JSON object");
      return object;
    }
    line.push_back(next);
    if (line.size() > kMaxLine) return fail(ErrorKind::kInvalid, "control connection: endless line");
  }
  return fail(ErrorKind::kGone, "control connection: the other end left or stopped answering");
}

Status ControlConnection::send(const Json& object) {
  const std::string line = object.dump() + "\n";
  return send_raw(std::as_bytes(std::span{line}));
}

Status ControlConnection::send_raw(std::span<const std::byte> bytes) {
  if (!send_all(socket_.get(), bytes.data(), bytes.size())) return fail_errno("control connection: send");
  return {};
}

Status ControlConnection::receive_raw(std::span<std::byte> bytes) {
  if (!receive_all(socket_.get(), bytes.data(), bytes.size()))
    return fail(ErrorKind::kGone, "control connection: the other end left in the middle of a transfer");
  return {};
}

Result<Json> ControlConnection::ask(const Json& request) {
  if (Status sent = send(request); !sent) return tl::make_unexpected(std::move(sent.error()));
  auto answer = receive();
  if (answer && !answer->value("ok", false))
    return fail(ErrorKind::kInvalid,
                "guest refused " + request.dump() + ": " + answer->value("error", "no reason given"));
  return answer;
}

}  // namespace tandem::traffic
