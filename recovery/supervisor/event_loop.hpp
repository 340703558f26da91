// SPDX-License-Identifier: Apache-2.0
// EventLoop: sd-event with C++ callbacks. One thread; callbacks may add and remove sources, their own included.
#pragma once

#include <systemd/sd-event.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "common/result.hpp"

namespace tandem {

class EventLoop {
 public:
  using Callback = std::function<void()>;
  struct Source {
    Source() = default;
    Source(Source&&) noexcept = default;
    Source& operator=(Source&&) noexcept = default;
    explicit operator bool() const { return handle != nullptr; }
    void reset() { handle.reset(); }

    struct Holder {
      Callback callback;
      sd_event_source* source = nullptr;
      ~Holder();
    };
    std::shared_ptr<Holder> handle;
  };
  using Timer = Source;

  static Result<EventLoop> make();

  /// Level-triggered EPOLLIN (and errors). The fd stays the caller's and must outlive the source.
  Result<Source> watch(int fd, Callback callback);
  Source after(std::chrono::nanoseconds delay, Callback callback);
  /// SIGTERM and SIGINT, which must be blocked.
  Result<Source> on_signal(int signal, Callback callback);
  /// Runs once, after the current callback returned.
  Source soon(Callback callback) { return after(std::chrono::nanoseconds{0}, std::move(callback)); }
  /// Until quit(); returns its code, or a negative errno if the loop itself failed.
  int run();
  /// Handles one event that is ready now; false if there is none.
  bool step() { return sd_event_run(event_.get(), 0) > 0; }
  void quit(int code = 0) { sd_event_exit(event_.get(), code); }

 private:
  struct Unref {
    void operator()(sd_event* event) const { sd_event_unref(event); }
  };
  std::unique_ptr<sd_event, Unref> event_;
};

}  // namespace tandem
