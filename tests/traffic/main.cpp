// SPDX-License-Identifier: Apache-2.0
// tandem-traffic: one static program for both ends of the test traffic, small enough for an initramfs.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "tests/traffic/guest_agent.hpp"
#include "tests/traffic/outside.hpp"

namespace {

using tandem::Result;
using namespace tandem::traffic;

constexpr const char* kUsage =
    "Usage: tandem-traffic guest [--interface NAME]            obey the outside (default interface: eth0)\n"
    "       tandem-traffic channels INTERFACE COUNT            use COUNT queue pairs\n"
    "       tandem-traffic outside --guest ADDRESS [OPTION]... run the traffic and report\n"
    "  --seconds N        how long; without it until SIGTERM or SIGINT\n"
    "  --flows N          UDP flows, each both ways (2)\n"
    "  --port N           first UDP port of the flows (7110): another one for each run at the same time\n"
    "  --rate N           datagrams a second each way, all flows together (1000)\n"
    "  --stream-rate N    bytes a second of the TCP stream (262144)\n"
    "  --json FILE        write the report there instead of standard output\n"
    "  --arrivals PREFIX  write arrival times to PREFIX.to_guest and PREFIX.from_guest: records of two 64-bit "
    "numbers,\n"
    "                     CLOCK_MONOTONIC of this host in ns, and the sequence number with the flow in the upper 16 "
    "bits\n"
    "  --connect-limit N  seconds to wait for the guest (60)\n"
    "  --drain-limit N    seconds without any arrival before a datagram is called lost (10)\n"
    "Exit status of outside: 0 all is as it should be, 1 something was lost or changed, 2 the run could not be made.\n";

using Options = std::map<std::string, std::function<void(const std::string&)>>;

/// Reads "--name value" pairs. False, with a sentence on stderr, when one is unknown or malformed.
bool read_options(const std::vector<std::string>& words, const Options& options) {
  for (std::size_t i = 0; i < words.size(); i += 2) {
    const auto option = options.find(words[i]);
    if (option == options.end() || i + 1 >= words.size()) {
      std::fprintf(stderr, "tandem-traffic: unknown option '%s', or its value is missing\n", words[i].c_str());
      return false;
    }
    try {
      option->second(words[i + 1]);
    } catch (const std::exception&) {
      std::fprintf(stderr, "tandem-traffic: '%s' is no value for %s\n", words[i + 1].c_str(), words[i].c_str());
      return false;
    }
  }
  return true;
}

int complain(const tandem::Error& error) {
  std::fprintf(stderr, "tandem-traffic: %s\n", error.text.c_str());
  return 2;
}

int guest(const std::vector<std::string>& words) {
  std::string interface = "eth0";
  if (!read_options(words, {{"--interface", [&](const std::string& value) { interface = value; }}})) return 2;
  const tandem::Status ended = run_guest_agent(interface);
  return ended ? 0 : complain(ended.error());
}

int channels(const std::vector<std::string>& words) {
  if (words.size() != 2) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  const auto used = set_channels(words[0], static_cast<unsigned>(std::strtoul(words[1].c_str(), nullptr, 10)));
  if (!used) return complain(used.error());
  std::printf("%s uses %u queue pairs\n", words[0].c_str(), *used);
  return 0;
}

int outside(const std::vector<std::string>& words) {
  using std::chrono::milliseconds;
  OutsideOptions options;
  const auto to_u32 = [](const std::string& value) { return static_cast<std::uint32_t>(std::stoul(value)); };
  const bool read = read_options(
      words,
      {{"--guest", [&](const std::string& value) { options.guest = value; }},
       {"--seconds", [&](const std::string& value) { options.seconds = std::stod(value); }},
       {"--flows", [&](const std::string& value) { options.flows = to_u32(value); }},
       {"--port", [&](const std::string& value) { options.port = static_cast<std::uint16_t>(std::stoul(value)); }},
       {"--rate", [&](const std::string& value) { options.rate = to_u32(value); }},
       {"--stream-rate", [&](const std::string& value) { options.stream_rate = std::stoull(value); }},
       {"--json", [&](const std::string& value) { options.json = value; }},
       {"--arrivals", [&](const std::string& value) { options.arrivals = value; }},
       {"--connect-limit",
        [&](const std::string& value) { options.connect_limit = milliseconds{1000 * to_u32(value)}; }},
       {"--drain-limit", [&](const std::string& value) { options.drain_limit = milliseconds{1000 * to_u32(value)}; }}});
  if (!read) return 2;
  if (options.guest.empty() || options.flows == 0 || options.rate == 0) {
    std::fputs("tandem-traffic: outside needs --guest, and --flows and --rate above 0\n", stderr);
    return 2;
  }
  const Result<bool> clean = run_outside(options);
  if (!clean) return complain(clean.error());
  return *clean ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc);
  const std::map<std::string, int (*)(const std::vector<std::string>&)> roles = {
      {"guest", guest}, {"channels", channels}, {"outside", outside}};
  const auto role = words.empty() ? roles.end() : roles.find(words[0]);
  if (role == roles.end()) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  words.erase(words.begin());
  return role->second(words);
}
