// SPDX-License-Identifier: Apache-2.0
// tandemd: the supervisor of all pairs of a host.
#include <spdlog/spdlog.h>
#include <systemd/sd-daemon.h>

#include <CLI/CLI.hpp>
#include <csignal>

#include "recovery/supervisor/journal.hpp"
#include "recovery/supervisor/supervisor.hpp"

namespace {

tandem::Status serve(const std::string& path) {
  tandem::Config config;
  if (!path.empty()) {
    auto read = tandem::read_config(path);
    if (!read) return tl::make_unexpected(std::move(read.error()));
    config = std::move(*read);
  }
  tandem::set_up_log(config.log_level);

  sigset_t signals;
  ::sigemptyset(&signals);
  for (const int signal : {SIGTERM, SIGINT}) ::sigaddset(&signals, signal);
  ::sigprocmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);

  auto loop = tandem::EventLoop::make();
  if (!loop) return tl::make_unexpected(std::move(loop.error()));
  auto supervisor = tandem::Supervisor::start(std::move(config), *loop);
  if (!supervisor) return tl::make_unexpected(std::move(supervisor.error()));
  std::vector<tandem::EventLoop::Source> sources;
  for (const int signal : {SIGTERM, SIGINT}) {
    auto source = loop->on_signal(signal, [&] { (*supervisor)->shut_down(); });
    if (!source) return tl::make_unexpected(std::move(source.error()));
    sources.push_back(std::move(*source));
  }
  sd_notify(0, "READY=1");
  if (loop->run() != 0)
    return tandem::fail(tandem::ErrorKind::kGone, "serve: tandemd had to give up; its log says why");
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  std::string config;
  CLI::App app{
      "Tandem's supervisor: keeps an active and a standby backend for every pair, and QEMU connected to them."};
  app.set_version_flag("--version", std::string("tandemd ") + TANDEM_VERSION);
  app.add_option("--config", config, "configuration file (TOML); defaults apply without one");
  CLI11_PARSE(app, argc, argv);
  if (auto served = serve(config); !served) {
    spdlog::critical("{}", served.error().text);
    return 1;
  }
  return 0;
}
