// SPDX-License-Identifier: Apache-2.0
// Choice of the log's sink, and the journal entry of a failover.
#include "recovery/supervisor/journal.hpp"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/sinks/systemd_sink.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace tandem {

namespace {

// Made once with systemd-id128 new; a failover's entries are found by it: journalctl MESSAGE_ID=...
constexpr char kFailoverId[] = "0763240b0b794cc09459348325cecbfb";

bool to_journal() {
  static const bool answer = is_journal_stream(std::getenv("JOURNAL_STREAM"), STDERR_FILENO);
  return answer;
}

}  // namespace

bool is_journal_stream(const char* journal_stream, int fd) {
  struct stat status {};
  if (journal_stream == nullptr || ::fstat(fd, &status) != 0) return false;
  return std::string_view(journal_stream) == std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino);
}

void set_up_log(const std::string& level) {
  spdlog::set_default_logger(to_journal() ? spdlog::systemd_logger_mt("tandemd") : spdlog::stderr_color_mt("tandemd"));
  spdlog::set_level(spdlog::level::from_str(level));
  spdlog::flush_on(spdlog::level::info);
}

void log_failover(const Incident& incident) {
  const TakeoverTimeline& timeline = incident.timeline;
  const std::uint64_t takeover_ns =
      timeline.fence_ns == 0 || timeline.replayed_ns < timeline.fence_ns ? 0 : timeline.replayed_ns - timeline.fence_ns;
  const std::string hang = incident.hang();
  const std::string text =
      fmt::format("pair {}: failover {} done: {}{}, heir {} took over {} us after the fence", incident.pair, incident.id,
                  incident.cause(), hang.empty() ? "" : " of its standby, which found it hung (" + hang + ")",
                  incident.heir_pid, takeover_ns / 1000);
  if (!to_journal()) return spdlog::warn("{}", text);
  if (!spdlog::should_log(spdlog::level::warn)) return;
  // In parentheses: the macro of this name adds the source line of this file, which helps nobody.
  (sd_journal_send)("MESSAGE=%s", text.c_str(), "MESSAGE_ID=%s", kFailoverId, "PRIORITY=%d", LOG_WARNING,
                    "SYSLOG_IDENTIFIER=tandemd", "TANDEM_PAIR=%s", incident.pair.c_str(), "TANDEM_SHARD=%u",
                    incident.shard, "TANDEM_INCIDENT=%llu", static_cast<unsigned long long>(incident.id),
                    "TANDEM_CAUSE=%s", incident.cause().c_str(), "TANDEM_VICTIM_PID=%d", incident.victim_pid,
                    "TANDEM_HEIR_PID=%d", incident.heir_pid, "TANDEM_TAKEOVER_NS=%llu",
                    static_cast<unsigned long long>(takeover_ns), nullptr);
}

}  // namespace tandem
