// SPDX-License-Identifier: Apache-2.0
// Namespaces, processes and control requests for PairHost.
#include "tests/support/pair_host.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "recovery/fence/kernel_version.hpp"

namespace tandem::test {

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

void write_file(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

// Its parent and its name, from /proc/PID/stat; parent 0: gone.
std::pair<pid_t, std::string> parent_and_name(pid_t pid) {
  const std::string stat = read_file("/proc/" + std::to_string(pid) + "/stat");
  const std::size_t open = stat.find('('), close = stat.rfind(')');
  if (open == std::string::npos || close == std::string::npos) return {0, {}};
  std::istringstream rest(stat.substr(close + 1));
  char state = 0;
  pid_t parent = 0;
  rest >> state >> parent;
  return state == 'Z' || state == 'X' ? std::pair<pid_t, std::string>{0, {}}
                                      : std::pair{parent, stat.substr(open + 1, close - open - 1)};
}

// Reaps what has ended; children of the test (and orphans that fell to it) only.
void reap() {
  while (::waitpid(-1, nullptr, WNOHANG) > 0) {
  }
}

std::vector<pid_t> descendants_of(pid_t ancestor) {
  std::map<pid_t, std::vector<pid_t>> children;
  for (const std::string& name : entries("/proc"))
    if (name.find_first_not_of("0123456789") == std::string::npos) {
      const auto pid = static_cast<pid_t>(std::stol(name));
      if (const pid_t parent = parent_and_name(pid).first; parent != 0) children[parent].push_back(pid);
    }
  std::vector<pid_t> found = children[ancestor];
  for (std::size_t i = 0; i < found.size(); ++i)
    for (const pid_t child : std::vector<pid_t>(children[found[i]])) found.push_back(child);
  return found;
}

std::vector<pid_t> descendants() { return descendants_of(::getpid()); }

// The process between the test and what it starts: whatever loses its parent falls to it, and if the test dies it ends
// them all. Ends itself when nothing is left.
[[noreturn]] void keep(pid_t test) {
  sigset_t signals;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGCHLD);
  ::sigaddset(&signals, SIGTERM);
  ::sigprocmask(SIG_BLOCK, &signals, nullptr);
  ::prctl(PR_SET_PDEATHSIG, SIGTERM);
  bool orphaned = ::getppid() != test;
  for (;;) {
    while (::waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    if (::waitpid(-1, nullptr, WNOHANG) < 0 && errno == ECHILD) ::_exit(0);
    if (orphaned) {
      for (const pid_t pid : descendants_of(::getpid())) ::kill(pid, SIGSTOP);
      for (const pid_t pid : descendants_of(::getpid())) ::kill(pid, SIGKILL);
    }
    int signal = 0;
    ::sigwait(&signals, &signal);
    orphaned = orphaned || signal == SIGTERM;
  }
}

UniqueFd connect_to(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  UniqueFd socket{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) return {};
  return socket;
}

}  // namespace

bool eventually(const std::function<bool()>& event, std::chrono::milliseconds limit) {
  const auto deadline = Clock::now() + limit;
  while (!event()) {
    if (Clock::now() > deadline) return false;
    ::poll(nullptr, 0, 5);
  }
  return true;
}

bool shell(const std::string& command) { return std::system(("(" + command + ") >/dev/null 2>&1").c_str()) == 0; }

std::vector<std::string> entries(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(directory, ignored))
    names.push_back(entry.path().filename().string());
  return names;
}

std::size_t descriptor_count(pid_t pid) { return entries("/proc/" + std::to_string(pid) + "/fd").size(); }

std::string proc_status(pid_t pid, const std::string& field) {
  std::istringstream status(read_file("/proc/" + std::to_string(pid) + "/status"));
  for (std::string line; std::getline(status, line);)
    if (line.starts_with(field + ":")) {
      const std::size_t value = line.find_first_not_of(" \t", field.size() + 1);
      return value == std::string::npos ? std::string{} : line.substr(value);
    }
  return {};
}

void keep_order_in_host_queues() {
  for (const std::string& port : entries("/sys/class/net"))
    for (const std::string& queue : entries("/sys/class/net/" + port + "/queues"))
      if (queue.starts_with("rx-")) write_file("/sys/class/net/" + port + "/queues/" + queue + "/rps_cpus", "1");
}

std::string PairHost::prepare() {
  if (::geteuid() != 0) return "needs root for namespaces, BPF and network devices";
  if (auto kernel = kernel_is_supported(running_kernel_release()); !kernel) return kernel.error().text;
  if (::unshare(CLONE_NEWNS | CLONE_NEWNET) != 0) return "needs mount and network namespaces (CAP_SYS_ADMIN)";
  ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
  // sysfs shows the network namespace that it was mounted in; bpffs begins empty.
  if (::mount("sysfs", "/sys", "sysfs", 0, nullptr) != 0) return "needs to mount sysfs";
  if (::mount("bpf", "/sys/fs/bpf", "bpf", 0, nullptr) != 0) return "needs a kernel with bpffs";
  if (::access("/sys/kernel/btf/vmlinux", R_OK) != 0) return "needs a kernel with BTF (CONFIG_DEBUG_INFO_BTF)";
  const UniqueFd xdp{::socket(AF_XDP, SOCK_RAW, 0)};
  if (!xdp) return "needs AF_XDP (CONFIG_XDP_SOCKETS)";
  if (!shell("ip link set lo up")) return "needs the ip command (iproute2)";
  return {};
}

PairHost::PairHost(PairHostOptions options)
    : options_(std::move(options)), instance_("t" + std::to_string(::getpid())) {
  std::string pattern = "/tmp/tandem-pair-XXXXXX";
  REQUIRE(::mkdtemp(pattern.data()) != nullptr);
  directory_ = pattern;
  ::chmod(directory_.c_str(), 0755);
  std::filesystem::create_directories(run_dir());
  ::prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
  if (options_.backend.empty()) options_.backend = TANDEM_BACKEND_BINARY;
  if (options_.tandemd.empty()) options_.tandemd = TANDEM_TANDEMD_BINARY;
  make_network(options_.outside_queues);
  write_config();
}

PairHost::~PairHost() {
  if (std::uncaught_exceptions() > 0 || std::getenv("TANDEM_TEST_LOG") != nullptr)
    std::fprintf(stderr, "---- log of this host ----\n%s----\n", log().c_str());
  kill_everything();
  shell("ip link del br0; ip link del host0");
  std::error_code ignored;
  std::filesystem::remove_all("/sys/fs/bpf/tandem", ignored);
  std::filesystem::remove_all(directory_, ignored);
}

void PairHost::make_network(unsigned outside_queues) {
  shell("ip link del br0; ip link del host0");
  for (const char* scope : {"all", "default"})
    write_file(std::string("/proc/sys/net/ipv6/conf/") + scope + "/disable_ipv6", "1");
  const std::string queues =
      " numrxqueues " + std::to_string(outside_queues) + " numtxqueues " + std::to_string(outside_queues);
  REQUIRE(shell("ip link add br0 type bridge mcast_snooping 0"));
  REQUIRE(shell("ip link add host0" + queues + " type veth peer name host0p" + queues));
  REQUIRE(shell("ethtool -K host0 tx off tso off gso off"));
  REQUIRE(shell("ip link set host0p master br0 up && ip link set br0 up && ip link set host0 up"));
  // Carriers come from a kernel work item; until then the port drops.
  REQUIRE(eventually([] { return shell("bridge link show dev host0p | grep -q 'state forwarding'"); }));
  keep_order_in_host_queues();
}

void PairHost::write_config() const {
  std::ofstream(directory_ + "/tandemd.toml")
      << "instance = \"" << instance_ << "\"\nrun_dir = \"" << run_dir() << "\"\nincident_dir = \"" << directory_
      << "/incidents\"\nlog_level = \"debug\"\n[backend]\npath = \"" << options_.backend
      << "\"\nuser = \"nobody\"\n[qemu]\nsocket_user = \"\"\nsocket_group = \"\"\n[pair]\nshards = " << options_.shards
      << "\npolling = \"" << options_.polling << "\"\nheirs = \"" << options_.heirs << "\"\nhugepages = \"never\"\n"
      << options_.configuration;
}

pid_t PairHost::launch(const std::vector<std::string>& words) const {
  std::vector<char*> arguments;
  for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  const std::string log_path = directory_ + "/log";
  int answer[2];
  REQUIRE(::pipe2(answer, O_CLOEXEC) == 0);
  const UniqueFd reading{answer[0]};
  UniqueFd writing{answer[1]};
  const pid_t test = ::getpid();
  const pid_t keeper = ::fork();
  REQUIRE(keeper >= 0);
  if (keeper == 0) {
    for (int number = 1; number < NSIG; ++number) ::signal(number, SIG_DFL);
    ::prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    const pid_t program = ::fork();
    if (program == 0) {
      const int log = ::open(log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0666);
      const int null = ::open("/dev/null", O_RDONLY);
      ::dup2(null, 0);
      ::dup2(log, 1);
      ::dup2(log, 2);
      for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
      ::execv(arguments[0], arguments.data());
      ::_exit(127);
    }
    [[maybe_unused]] const ssize_t written = ::write(writing.get(), &program, sizeof program);
    // A front end's socket that stayed open here would hide that the test has closed it.
    ::syscall(SYS_close_range, 3, ~0u, 0);
    keep(test);
  }
  writing.reset();
  pid_t program = 0;
  REQUIRE(::read(reading.get(), &program, sizeof program) == sizeof program);
  return program;
}

void PairHost::start() {
  const std::string config = directory_ + "/tandemd.toml";
  leaders_.clear();
  if (options_.supervised) {
    leaders_.push_back(launch({TANDEM_VAULT_BINARY, "--socket", run_dir() + "/vault.sock", "--user", "daemon",
                               "--supervise", options_.tandemd, "--config", config}));
  } else {
    start_vault();
    start_tandemd();
  }
  REQUIRE(eventually([&] { return status().value("ok", false); }));
}

void PairHost::start_vault() {
  leaders_.push_back(launch({TANDEM_VAULT_BINARY, "--socket", run_dir() + "/vault.sock", "--user", "daemon"}));
}

void PairHost::start_tandemd() {
  leaders_.insert(leaders_.begin(), launch({options_.tandemd, "--config", directory_ + "/tandemd.toml"}));
}

std::string PairHost::stop() {
  std::string left;
  // tandemd first: the vault must be there for its last words.
  const std::vector<pid_t> ours = processes();
  for (const pid_t leader : std::exchange(leaders_, {})) {
    if (std::find(ours.begin(), ours.end(), leader) == ours.end()) continue;  // died before
    ::kill(leader, SIGTERM);
    eventually([&] { return reap(), parent_and_name(leader).first == 0; });
  }
  if (!eventually([&] { return reap(), processes().empty(); })) {
    left += "processes still run;";
    kill_everything();
  }
  // The vault, without privileges, may not remove it; a service manager removes the folder.
  if (!options_.supervised) ::unlink((run_dir() + "/vault.sock").c_str());
  for (const std::string& name : entries(run_dir())) left += " " + run_dir() + "/" + name + ";";
  for (const std::string& name : entries("/sys/class/net"))
    if (name.starts_with("tdm")) left += " link " + name + ";";
  if (std::filesystem::exists("/sys/fs/bpf/tandem/" + instance_)) left += " pins;";
  const std::string mounts = read_file("/proc/self/mounts");
  if (mounts.find(directory_) != std::string::npos) left += " a mount;";
  return left;
}

void PairHost::kill_everything() {
  // The parents first, or they would start anew what dies under them.
  for (const pid_t pid : processes()) ::kill(pid, SIGSTOP);
  for (const pid_t pid : processes()) ::kill(pid, SIGKILL);
  eventually([&] { return reap(), processes().empty(); });
  reap();
  leaders_.clear();
}

UniqueFd PairHost::tell(const json& request) const {
  UniqueFd socket = connect_to(control_socket());
  const std::string line = request.dump() + "\n";
  if (!socket || ::send(socket.get(), line.data(), line.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(line.size()))
    return {};
  return socket;
}

PairHost::json PairHost::ask(const json& request) const {
  const UniqueFd socket = tell(request);
  if (!socket) return {{"ok", false}, {"error", "tandemd is not there"}};
  std::string answer;
  char buffer[8192];
  for (;;) {
    pollfd wait{socket.get(), POLLIN, 0};
    if (::poll(&wait, 1, std::chrono::milliseconds(kFailsafe).count()) != 1)
      return {{"ok", false}, {"error", "no answer"}};
    const ssize_t got = ::recv(socket.get(), buffer, sizeof buffer, 0);
    if (got <= 0) break;
    answer.append(buffer, static_cast<std::size_t>(got));
  }
  auto parsed = json::parse(answer, nullptr, false);
  return parsed.is_object() ? parsed : json{{"ok", false}, {"error", "broken answer: " + answer}};
}

PairHost::json PairHost::hook(const std::string& domain, const std::string& operation, const std::string& sub_operation,
                              const std::string& xml) const {
  return ask({{"command", "hook"},
              {"name", domain},
              {"operation", operation},
              {"sub_operation", sub_operation},
              {"xml", xml}});
}

std::string PairHost::nic_socket(const std::string& mac) const {
  std::string name = mac;
  std::replace(name.begin(), name.end(), ':', '-');
  return run_dir() + "/nic/" + name + ".sock";
}

std::string PairHost::domain_xml(const std::string& name, const std::vector<TestNic>& nics) const {
  std::string options, interfaces;
  for (const TestNic& nic : nics) {
    options += "<tandem:nic mac='" + nic.mac + "' pair='" + nic.pair + "'><tandem:uplink " + nic.uplink + "/>" +
               (nic.watchdog.empty() ? "" : "<tandem:watchdog " + nic.watchdog + "/>") + "</tandem:nic>";
    interfaces += "<interface type='vhostuser'><mac address='" + nic.mac + "'/><source type='unix' path='" +
                  nic_socket(nic.mac) +
                  "' mode='client'><reconnect enabled='yes' timeout='1'/></source><model type='virtio'/>" +
                  "<driver queues='" + std::to_string(nic.queues) + "'/></interface>";
  }
  return "<domain type='qemu'><name>" + name + "</name><uuid>6c7dc2a6-5f0b-4d8c-a9d6-4c4fb0d1b7c1</uuid><metadata>" +
         "<tandem:domain xmlns:tandem='urn:tandem:domain:1'>" + options + "</tandem:domain></metadata>" +
         "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking><devices>" + interfaces +
         "</devices></domain>";
}

PairHost::json PairHost::prepare_domain(const std::string& name, const std::vector<TestNic>& nics) const {
  auto answer = hook(name, "prepare", "begin", domain_xml(name, nics));
  keep_order_in_host_queues();
  return answer;
}

PairHost::json PairHost::release_domain(const std::string& name) const {
  return hook(name, "release", "end", "<domain/>");
}

PairHost::json PairHost::nic(const std::string& mac) const {
  const json all = status();
  for (const json& nic : all.value("nics", json::array()))
    if (nic["mac"] == mac) return nic;
  return nullptr;
}

PairHost::json PairHost::pair(const std::string& name) const {
  const json all = status();
  for (const json& pair : all.value("pairs", json::array()))
    if (pair["name"] == name) return pair;
  return nullptr;
}

pid_t PairHost::active() const {
  const json found = pair();
  // Never 0: kill(0) would end our own process group.
  if (found.is_null() || found["active"]["pid"].is_null()) throw std::runtime_error("the pair has no active backend");
  return found["active"]["pid"].get<pid_t>();
}

pid_t PairHost::standby() const {
  const json found = pair();
  return found.is_null() || found["standby"]["state"] != "ready" ? 0 : found["standby"]["pid"].get<pid_t>();
}

bool PairHost::wait_paired(pid_t not_this) const {
  return eventually([&] {
    const json found = pair();
    return !found.is_null() && found["state"] == "paired" && found["standby"]["state"] == "ready" &&
           found["active"]["pid"].is_number() && found["active"]["pid"].get<pid_t>() != not_this;
  });
}

std::vector<pid_t> PairHost::processes(const std::string& name) const {
  std::vector<pid_t> found;
  // The kernel keeps 15 characters of a name.
  for (const pid_t pid : descendants())
    if (parent_and_name(pid).second.starts_with(name.substr(0, 14))) found.push_back(pid);
  return found;
}

std::vector<pid_t> PairHost::processes() const {
  std::vector<pid_t> found = processes("tandem-vault");
  for (const char* name : {"tandemd", "tandem-backend"})
    for (const pid_t pid : processes(name)) found.push_back(pid);
  return found;
}

std::string PairHost::log() const { return read_file(directory_ + "/log"); }

}  // namespace tandem::test
