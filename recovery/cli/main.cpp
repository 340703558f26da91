// SPDX-License-Identifier: Apache-2.0
// virt-tandem: Tandem's command line beside virsh, and the other end of libvirt's hook.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <thread>

#include "recovery/cli/client.hpp"
#include "recovery/cli/host_validate.hpp"
#include "recovery/cli/tables.hpp"
#include "vmm/domain_option.hpp"

namespace {

using nlohmann::json;

struct Options {
  std::string socket = "/run/tandem/control.sock";
  bool json = false;
};

int complain(const std::string& text) {
  std::fprintf(stderr, "error: %s\n", text.c_str());
  return 1;
}

int print(const Options& options, const tandem::Result<json>& answer, std::string (*table)(const json&)) {
  if (!answer) {
    if (options.json) std::printf("%s\n", json{{"ok", false}, {"error", answer.error().text}}.dump(2).c_str());
    return complain(answer.error().text);
  }
  std::printf("%s", options.json ? (answer->dump(2) + "\n").c_str() : table(*answer).c_str());
  return 0;
}

std::string disabled_text(const json& answer) { return "NIC " + answer.value("mac", std::string{}) + " disabled\n"; }
std::string enabled_text(const json& answer) { return "NIC " + answer.value("mac", std::string{}) + " enabled\n"; }
std::string incidents_of(const json& answer) { return tandem::incident_table(answer); }

int host_validate(const Options& options) {
  bool failed = false;
  json list = json::array();
  for (const tandem::HostCheck& check : tandem::validate_host(options.socket)) {
    constexpr const char* kNames[] = {"PASS", "WARN", "FAIL"};
    const char* name = kNames[static_cast<int>(check.verdict)];
    failed = failed || check.verdict == tandem::HostCheck::Verdict::kFail;
    list.push_back({{"check", check.what}, {"verdict", name}, {"remedy", check.remedy}});
    if (!options.json)
      std::printf("%s: %s%s%s\n", name, check.what.c_str(), check.remedy.empty() ? "" : "\n      ",
                  check.remedy.c_str());
  }
  if (options.json) std::printf("%s\n", json{{"ok", !failed}, {"checks", list}}.dump(2).c_str());
  return failed ? 1 : 0;
}

// A tandemd that dies over a request is back within a second or two, and asking again is safe: it takes back what the
// first try left. libvirt asks only once, so the hook does.
tandem::Result<json> ask_patiently(const std::string& socket, const json& request) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kRestart = std::chrono::seconds{3};
  constexpr int kMostDeaths = 3;
  auto until = Clock::now() + kRestart;
  for (int deaths = 0;;) {
    auto answer = tandem::ask_tandemd(socket, request);
    if (answer || answer.error().kind == tandem::ErrorKind::kInvalid) return answer;  // a refusal is an answer
    if (answer.error().kind == tandem::ErrorKind::kGone && ++deaths <= kMostDeaths) until = Clock::now() + kRestart;
    if (Clock::now() >= until) return answer;
    std::this_thread::sleep_for(std::chrono::milliseconds{50});
  }
}

// libvirt's hook: NAME OPERATION SUB_OPERATION EXTRA, the domain's XML on standard input. What goes to standard error
// appears in virsh's message when the start is refused.
int hook(const Options& options, const std::vector<std::string>& words) {
  const auto word = [&](std::size_t n) { return n < words.size() ? words[n] : std::string{}; };
  const std::string xml{std::istreambuf_iterator<char>(std::cin), {}};
  const bool starting = word(1) == "prepare" && word(2) == "begin";
  const bool ending = word(1) == "release";
  // Everything else must succeed: a failing "reconnect" would make libvirtd kill the running guest.
  if ((!starting && !ending) || !tandem::names_tandem(xml)) return 0;
  const auto answer = ask_patiently(
      options.socket,
      {{"command", "hook"}, {"name", word(0)}, {"operation", word(1)}, {"sub_operation", word(2)}, {"xml", xml}});
  if (answer) return 0;
  std::fprintf(stderr, "tandem: %s\n", answer.error().text.c_str());
  return starting ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"Look at and drive Tandem's backend pairs."};
  app.set_version_flag("--version", std::string("virt-tandem ") + TANDEM_VERSION);
  app.add_option("--socket", options.socket, "tandemd's control socket")->envname("TANDEM_SOCKET");
  app.require_subcommand(1);

  auto* status = app.add_subcommand("status", "pairs and NICs");
  auto* incidents = app.add_subcommand("incidents", "failovers, newest last");
  auto* drill = app.add_subcommand("drill", "make the active backend fail and report the failover");
  auto* nic = app.add_subcommand("nic", "take a NIC's link down, or let QEMU connect again");
  auto* disable =
      nic->add_subcommand("disable", "close QEMU's connection and refuse others: the guest's link goes down");
  auto* enable = nic->add_subcommand("enable", "undo that, also where Tandem parked the NIC itself");
  disable->alias("park");
  enable->alias("unpark");
  nic->require_subcommand(1);
  auto* switchover =
      app.add_subcommand("switchover", "let the standby take over from the active backend, which lives on");
  auto* validate = app.add_subcommand("host-validate", "check what this host has and lacks");
  auto* hook_command =
      app.add_subcommand("hook", "for libvirt's hook: NAME OPERATION SUB_OPERATION EXTRA, XML on stdin");
  for (auto* command : {status, incidents, drill, switchover, disable, enable, validate})
    command->add_flag("--json", options.json, "JSON instead of a table");
  std::string pair = "default";
  std::string fault = "segv";
  drill->add_option("--pair", pair, "pair to drill");
  switchover->add_option("--pair", pair, "pair to switch over");
  drill->add_option("--fault", fault, "how to fail")
      ->check(CLI::IsMember({"segv", "abort", "bus", "spin", "block", "exit", "livelock"}));
  std::uint32_t after_ms = 0;
  drill->add_option("--after", after_ms, "milliseconds until it fails")->check(CLI::Range(0, 10'000));
  std::string mac, reason;
  for (auto* command : {disable, enable}) command->add_option("mac", mac, "the NIC's MAC address")->required();
  disable->add_option("--reason", reason, "shown by status");
  std::vector<std::string> words;
  hook_command->add_option("words", words, "libvirt's arguments");
  CLI11_PARSE(app, argc, argv);

  if (status->parsed())
    return print(options, tandem::ask_tandemd(options.socket, {{"command", "status"}}), tandem::status_table);
  if (incidents->parsed())
    return print(options, tandem::ask_tandemd(options.socket, {{"command", "incidents"}}), tandem::incident_table);
  if (drill->parsed())
    return print(options,
                 tandem::ask_tandemd(options.socket,
                                     {{"command", "drill"}, {"pair", pair}, {"fault", fault}, {"after_ms", after_ms}}),
                 incidents_of);
  if (switchover->parsed())
    return print(options, tandem::ask_tandemd(options.socket, {{"command", "switchover"}, {"pair", pair}}),
                 incidents_of);
  if (disable->parsed())
    return print(options,
                 tandem::ask_tandemd(options.socket,
                                     {{"command", "nic"}, {"action", "disable"}, {"mac", mac}, {"reason", reason}}),
                 disabled_text);
  if (enable->parsed())
    return print(options, tandem::ask_tandemd(options.socket, {{"command", "nic"}, {"action", "enable"}, {"mac", mac}}),
                 enabled_text);
  if (validate->parsed()) return host_validate(options);
  return hook(options, words);
}
