// SPDX-License-Identifier: Apache-2.0
// virt-tandem and the libvirt hook as programs, mostly without a tandemd; tables.
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "recovery/cli/tables.hpp"
#include "recovery/supervisor/control_server.hpp"
#include "tests/support/skip.hpp"

using namespace tandem;
using nlohmann::json;

namespace {

const std::string kForeign = "<domain type='kvm'><name>other</name></domain>";
const std::string kTandem =
    "<domain type='kvm'><name>web</name><metadata><tandem:domain "
    "xmlns:tandem='urn:tandem:domain:1'/></metadata></domain>";

struct Ended {
  int status = -1;
  std::string output, errors;
};

class Directory {
 public:
  Directory() {
    std::string pattern = "/tmp/tandem-cli-XXXXXX";
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  ~Directory() { std::filesystem::remove_all(path_); }
  [[nodiscard]] std::string at(const std::string& name) const { return path_ + "/" + name; }

  /// Runs a command line with `input` on standard input.
  [[nodiscard]] Ended run(const std::string& command, const std::string& input = {}) const {
    std::ofstream(at("in")) << input;
    const int status = std::system((command + " <" + at("in") + " >" + at("out") + " 2>" + at("err")).c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128, read("out"), read("err")};
  }
  [[nodiscard]] std::string read(const std::string& name) const {
    std::ostringstream text;
    text << std::ifstream(at(name)).rdbuf();
    return text.str();
  }

 private:
  std::string path_;
};

std::string virt_tandem(const std::string& socket) {
  return std::string(TANDEM_CLI_BINARY) + " --socket " + socket + " ";
}

}  // namespace

TEST_CASE("the hook without a tandemd: only a domain that asks for Tandem is stopped, and only at its start") {
  const Directory directory;
  const std::string hook = virt_tandem(directory.at("nobody.sock")) + "hook ";
  for (const char* step :
       {"other prepare begin -", "other start begin -", "other started begin -", "other stopped end -",
        "other release end -", "other reconnect begin -", "other migrate begin -", ""}) {
    INFO(step);
    const Ended ended = directory.run(hook + step, kForeign);
    CHECK(ended.status == 0);
    CHECK(ended.output.empty());
    CHECK(ended.errors.empty());
  }
  const Ended refused = directory.run(hook + "web prepare begin -", kTandem);
  CHECK(refused.status == 1);
  CHECK(refused.errors.find("tandemd") != std::string::npos);
  CHECK(refused.errors.find("Start it") != std::string::npos);
  // A failing "reconnect" would make libvirtd kill the running guest.
  for (const char* step : {"web reconnect begin -", "web release end -", "web stopped end -", "web start begin -"}) {
    INFO(step);
    CHECK(directory.run(hook + step, kTandem).status == 0);
  }
}

TEST_CASE("the hook's script: as the program, and safe without it") {
  const Directory directory;
  const auto install = [&](const std::string& program) {
    std::ostringstream text;
    text << std::ifstream(TANDEM_HOOK_TEMPLATE).rdbuf();
    std::string script = text.str();
    const std::string mark = "@TANDEM_VIRT_TANDEM@";
    REQUIRE(script.find(mark) != std::string::npos);
    script.replace(script.find(mark), mark.size(), program);
    std::ofstream(directory.at("hook")) << script;
    std::filesystem::permissions(directory.at("hook"), std::filesystem::perms(0755));
  };
  const std::string hook = "TANDEM_SOCKET=" + directory.at("nobody.sock") + " " + directory.at("hook") + " ";
  for (const std::string& program : {std::string(TANDEM_CLI_BINARY), directory.at("not-there")}) {
    INFO(program);
    install(program);
    CHECK(directory.run(hook + "other prepare begin -", kForeign).status == 0);
    const Ended refused = directory.run(hook + "web prepare begin -", kTandem);
    CHECK(refused.status != 0);
    CHECK(refused.errors.size() > 20);
    CHECK(directory.run(hook + "web reconnect begin -", kTandem).status == 0);
    CHECK(directory.run(hook + "web release end -", kTandem).status == 0);
    CHECK(directory.run(hook + "web stopped end -", kTandem).status == 0);
    CHECK(directory.run(hook + "other reconnect begin -", "not even XML").status == 0);
  }
}

TEST_CASE("without a tandemd every command says what to do, and exits with 1") {
  const Directory directory;
  const std::string program = virt_tandem(directory.at("nobody.sock"));
  for (const char* command : {"status", "incidents", "drill", "switchover"}) {
    INFO(command);
    const Ended plain = directory.run(program + command);
    CHECK(plain.status == 1);
    CHECK(plain.errors.find("error: ") == 0);
    CHECK(plain.errors.find("tandemd") != std::string::npos);
    const Ended machine = directory.run(program + command + " --json");
    CHECK(machine.status == 1);
    CHECK(json::parse(machine.output)["ok"] == false);
  }
  CHECK(directory.run(program + "drill --fault flood").status != 0);
  for (const char* wrong : {"10001", "-1", "1.5", "soon"}) {
    const auto refused = directory.run(program + "drill --after " + wrong);
    CHECK(refused.status > 1);  // 1: nobody answered
    CHECK((refused.output + refused.errors).find("--after") != std::string::npos);
  }
  CHECK(directory.run(program + "dance").status != 0);
  CHECK(directory.run(std::string(TANDEM_CLI_BINARY)).status != 0);
  CHECK(directory.run(program + "--version").output.find("virt-tandem ") == 0);
}

TEST_CASE("host-validate: a verdict for each thing, a remedy for each that is missing") {
  const Directory directory;
  const std::string program = virt_tandem(directory.at("nobody.sock"));
  const Ended plain = directory.run(program + "host-validate");
  CHECK(plain.status == 1);  // there is no tandemd
  const Ended machine = directory.run(program + "host-validate --json");
  CHECK(machine.status == 1);
  const json answer = json::parse(machine.output);
  CHECK(answer["ok"] == false);
  REQUIRE(answer["checks"].size() >= 6);
  bool found = false;
  for (const json& check : answer["checks"]) {
    CAPTURE(check.dump());
    const std::string verdict = check["verdict"];
    CHECK((verdict == "PASS" || verdict == "WARN" || verdict == "FAIL"));
    CHECK((verdict == "PASS") == check["remedy"].get<std::string>().empty());
    CHECK(plain.output.find(verdict + ": " + check["check"].get<std::string>()) != std::string::npos);
    found = found || (check["check"].get<std::string>().find("tandemd answers") == 0 && verdict == "FAIL");
  }
  CHECK(found);
}

TEST_CASE("host-validate: what this host has and a lesser one lacks is named with its remedy") {
  if (::geteuid() != 0) TANDEM_SKIP("not root: a lesser host is played in a mount namespace");
  struct Row {
    const char* hidden;
    const char* says;
  };
  const Row rows[] = {{"/dev/net", "modprobe tun"},
                      {"/run/libvirt", "libvirtd -d"},
                      {"/sys/kernel/btf", "CONFIG_DEBUG_INFO_BTF"},
                      {"/etc/libvirt", "install it, then restart libvirtd"}};
  const Directory directory;
  const std::string validate = virt_tandem(directory.at("nobody.sock")) + "host-validate";
  for (const Row& row : rows) {
    INFO(row.hidden);
    // A folder that is not there hides what is in it just as well.
    const Ended lesser =
        directory.run(std::string("unshare --mount sh -c 'if test -d ") + row.hidden + "; then mount -t tmpfs none " +
                      row.hidden + " || exit 77; fi; " + validate + "'");
    if (lesser.status == 77) TANDEM_SKIP("cannot mount in a namespace of its own");
    CHECK(lesser.status == 1);
    CHECK(lesser.output.find(row.says) != std::string::npos);
  }
  // An old kernel: uname says 2.6 under this personality.
  const Ended old = directory.run("setarch --uname-2.6 " + validate);
  CHECK(old.output.find("too old") != std::string::npos);
  CHECK(old.output.find("backports") != std::string::npos);
}

TEST_CASE("tandemd on a kernel before 6.4 says what to run instead") {
  if (::geteuid() != 0) TANDEM_SKIP("not root: tandemd would say only that");
  const Directory directory;
  const Ended ended = directory.run("setarch --uname-2.6 " TANDEM_TANDEMD_BINARY);
  CHECK(ended.status == 1);
  CHECK(ended.errors.find("6.4") != std::string::npos);
  CHECK(ended.errors.find("backports") != std::string::npos);
}

TEST_CASE("the hook hands everything to tandemd, and its refusal to libvirt") {
  const Directory directory;
  auto loop = EventLoop::make();
  REQUIRE(loop.has_value());
  std::vector<json> requests;
  auto server = ControlServer::listen(
      directory.at("control.sock"), *loop, [&](const json& request, const ControlServer::Answer& answer) {
        requests.push_back(request);
        if (request["command"] == "status") loop->quit();
        answer(request.value("name", "") == "bad" ? refusal("bridge br7 is missing; make it") : json{{"ok", true}});
      });
  REQUIRE(server.has_value());
  Ended good, bad, foreign, released;
  std::thread client([&] {
    const std::string hook = virt_tandem(directory.at("control.sock")) + "hook ";
    good = directory.run(hook + "web prepare begin -", kTandem);
    bad = directory.run(hook + "bad prepare begin -", kTandem);
    foreign = directory.run(hook + "other prepare begin -", kForeign);
    released = directory.run(hook + "bad release end -", kTandem);
    static_cast<void>(directory.run(virt_tandem(directory.at("control.sock")) + "status"));
  });
  // The failsafe; the fourth request, the status, ends the loop.
  const auto end = loop->after(std::chrono::seconds{30}, [&] { loop->quit(); });
  loop->run();
  client.join();
  CHECK(good.status == 0);
  CHECK(bad.status == 1);
  CHECK(bad.errors == "tandem: bridge br7 is missing; make it\n");
  CHECK(foreign.status == 0);
  CHECK(released.status == 0);
  REQUIRE(requests.size() == 4);
  CHECK(requests[0] == json{{"command", "hook"},
                            {"name", "web"},
                            {"operation", "prepare"},
                            {"sub_operation", "begin"},
                            {"xml", kTandem}});
  CHECK(requests[2]["operation"] == "release");
}

TEST_CASE("tables") {
  const json status{{"pairs",
                     {{{"name", "default"},
                       {"state", "solo"},
                       {"active", {{"pid", 41}, {"state", "polling"}}},
                       {"standby", {{"pid", nullptr}, {"state", "none"}}},
                       {"epoch", 7},
                       {"nics", {"52:54:00:00:00:01"}}}}},
                    {"nics",
                     {{{"mac", "52:54:00:00:00:01"},
                       {"domain", "web"},
                       {"pair", "default"},
                       {"uplink", {{"bridge", "br0"}, {"device", "tdm1"}}},
                       {"uplink_problem", ""},
                       {"fault", "guest memory disappeared"},
                       {"connected", true},
                       {"rx", {{"packets", 5}, {"bytes", 1}, {"dropped", 2}}},
                       {"tx", {{"packets", 6}, {"bytes", 1}, {"dropped", 3}}},
                       {"overflow", 9}}}}};
  const std::string table = status_table(status);
  INFO(table);
  for (const char* word : {"41 polling", "- none", "br0", "connected", "guest memory disappeared", "web"})
    CHECK(table.find(word) != std::string::npos);
  CHECK(status_table({{"pairs", json::array()}, {"nics", json::array()}}).find("Pair") != std::string::npos);
}
