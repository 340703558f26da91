// SPDX-License-Identifier: Apache-2.0
// /proc/TID/stat: state, flags, start time.
#include "recovery/fence/thread_identity.hpp"

#include <fcntl.h>

#include <array>
#include <charconv>
#include <string>
#include <vector>

#include "common/unique_fd.hpp"

namespace tandem {
namespace {

constexpr std::uint64_t kExitingFlag = 0x4;  // PF_EXITING, include/linux/sched.h
// Positions after the command name, which is field 2 of proc.rst's table.
constexpr std::size_t kState = 0;
constexpr std::size_t kFlags = 6;
constexpr std::size_t kStartTime = 19;

std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> fields;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find_first_of(" \n"), text.size());
    if (end > 0) fields.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return fields;
}

template <class Number>
bool parse(std::string_view text, Number& number) {
  const auto result = std::from_chars(text.data(), text.data() + text.size(), number);
  return result.ec == std::errc{} && result.ptr == text.data() + text.size();
}

}  // namespace

Result<ThreadIdentity> parse_thread_stat(std::string_view line) {
  const auto invalid = fail(ErrorKind::kInvalid, "read a thread's stat line: not in the form proc(5) describes");
  const std::size_t open = line.find(" (");
  const std::size_t close = line.rfind(')');
  if (open == std::string_view::npos || close == std::string_view::npos || close < open) return invalid;
  ThreadIdentity identity;
  std::uint64_t flags = 0;
  const auto fields = split(line.substr(close + 1));
  if (fields.size() <= kStartTime || !parse(line.substr(0, open), identity.tid) || !parse(fields[kFlags], flags) ||
      !parse(fields[kStartTime], identity.start_ticks))
    return invalid;
  identity.exiting = (flags & kExitingFlag) != 0 || fields[kState] == "Z" || fields[kState] == "X";
  return identity;
}

Result<ThreadIdentity> identify_thread(pid_t tid, pid_t process) {
  const std::string path = process != 0 ? "/proc/" + std::to_string(process) + "/task/" + std::to_string(tid) + "/stat"
                                        : "/proc/" + std::to_string(tid) + "/stat";
  const std::string doing = "look up thread " + std::to_string(tid);
  const UniqueFd file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  std::array<char, 4096> text{};
  const ssize_t got = file ? ::read(file.get(), text.data(), text.size()) : -1;
  if (got < 0) {
    if (errno == ENOENT || errno == ESRCH) return fail(ErrorKind::kGone, doing + ": it does not exist");
    return fail_errno(doing + " in " + path, "Tandem needs /proc, mounted without hidepid for root");
  }
  auto identity = parse_thread_stat({text.data(), static_cast<std::size_t>(got)});
  if (!identity) return within(doing, std::move(identity.error()));
  return identity;
}

}  // namespace tandem
