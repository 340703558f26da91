// SPDX-License-Identifier: Apache-2.0
// Glue between sd-event and std::function.
#include "recovery/supervisor/event_loop.hpp"

#include <sys/epoll.h>

namespace tandem {

namespace {

using Holder = EventLoop::Source::Holder;

// A callback may drop the Source that it belongs to: run a copy.
int run_holder(void* data) {
  const EventLoop::Callback callback = static_cast<Holder*>(data)->callback;
  callback();
  return 0;
}
int on_io(sd_event_source*, int, std::uint32_t, void* data) { return run_holder(data); }
int on_time(sd_event_source*, std::uint64_t, void* data) { return run_holder(data); }
int on_signal_event(sd_event_source*, const struct signalfd_siginfo*, void* data) { return run_holder(data); }

}  // namespace

EventLoop::Source::Holder::~Holder() { sd_event_source_disable_unref(source); }

Result<EventLoop> EventLoop::make() {
  EventLoop loop;
  sd_event* event = nullptr;
  if (const int made = sd_event_new(&event); made < 0) return fail_errno("make the event loop", {}, -made);
  loop.event_.reset(event);
  return loop;
}

Result<EventLoop::Source> EventLoop::watch(int fd, Callback callback) {
  Source source;
  source.handle = std::make_shared<Holder>();
  source.handle->callback = std::move(callback);
  if (const int added = sd_event_add_io(event_.get(), &source.handle->source, fd, EPOLLIN, on_io, source.handle.get());
      added < 0)
    return fail_errno("watch a descriptor", {}, -added);
  return source;
}

EventLoop::Source EventLoop::after(std::chrono::nanoseconds delay, Callback callback) {
  Source source;
  source.handle = std::make_shared<Holder>();
  source.handle->callback = std::move(callback);
  const auto microseconds =
      static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(delay).count());
  // Accuracy 1 us: the default would coalesce to 250 ms. Out of memory is the only failure; it aborts like any other.
  if (sd_event_add_time_relative(event_.get(), &source.handle->source, CLOCK_MONOTONIC, microseconds, 1, on_time,
                                 source.handle.get()) < 0)
    std::abort();
  return source;
}

Result<EventLoop::Source> EventLoop::on_signal(int signal, Callback callback) {
  Source source;
  source.handle = std::make_shared<Holder>();
  source.handle->callback = std::move(callback);
  if (const int added =
          sd_event_add_signal(event_.get(), &source.handle->source, signal, on_signal_event, source.handle.get());
      added < 0)
    return fail_errno("watch a signal", "it must be blocked in all threads", -added);
  return source;
}

int EventLoop::run() { return sd_event_loop(event_.get()); }

}  // namespace tandem
