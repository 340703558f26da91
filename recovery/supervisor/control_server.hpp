// SPDX-License-Identifier: Apache-2.0
// ControlServer: the socket that virt-tandem and the libvirt hook talk to. One JSON request a connection, one JSON
// answer.
//
// Request: an object on one line, {"command": "...", ...}. Answer: {"ok": true, ...} or {"ok": false, "error":
// "sentence"}; then the connection is closed. Event loop's thread only. A client that is slow, silent or too long costs
// only itself.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "common/result.hpp"
#include "common/unique_fd.hpp"
#include "recovery/supervisor/event_loop.hpp"

namespace tandem {

class ControlServer {
 public:
  /// Answers one request, once, now or later; a second call does nothing.
  using Answer = std::function<void(nlohmann::json)>;
  using Handler = std::function<void(const nlohmann::json& request, Answer answer)>;

  /// Listens on `path` (mode 0660, root's); a stale socket there is replaced.
  static Result<std::unique_ptr<ControlServer>> listen(const std::string& path, EventLoop& loop, Handler handler);
  ~ControlServer();

 private:
  struct Client {
    UniqueFd socket;
    std::string received;
    EventLoop::Source readable;
    EventLoop::Timer limit;
    bool asked = false;
  };
  ControlServer(std::string path, EventLoop& loop, Handler handler)
      : path_(std::move(path)), loop_(loop), handler_(std::move(handler)) {}
  void on_connection();
  void on_readable(std::uint64_t id);
  void answer(std::uint64_t id, const nlohmann::json& reply);

  std::string path_;
  EventLoop& loop_;
  Handler handler_;
  UniqueFd socket_;
  EventLoop::Source accepting_;
  std::uint64_t next_id_ = 1;
  std::map<std::uint64_t, Client> clients_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // answers may outlive the server
};

/// A listening SOCK_STREAM unix socket at `path`, replacing a stale one, with mode and owner as given (-1: unchanged).
Result<UniqueFd> listen_unix(const std::string& path, unsigned mode, int user = -1, int group = -1);

inline nlohmann::json refusal(const std::string& text) { return {{"ok", false}, {"error", text}}; }

}  // namespace tandem
