// SPDX-License-Identifier: Apache-2.0
// tandem-backend: one process of a pair. Started by tandemd; of no use by hand.
#include <link.h>
#include <pthread.h>
#include <rte_alarm.h>
#include <rte_cycles.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_launch.h>
#include <rte_lcore.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "common/mapping.hpp"
#include "common/thread_priority.hpp"
#include "vhost-net-backend/confinement.hpp"
#include "vhost-net-backend/controller.hpp"
#include "vhost-net-backend/guest_memory.hpp"

namespace {

struct Options {
  int control_fd = -1;
  unsigned shards = 1;
  bool hugepages = false;
  bool allow_root = false;
  std::string file_prefix = "tandem";
};

// "0@(0,1),1@(0,1)": one logical core for control and one a shard, each allowed on every CPU that we are allowed on.
std::string logical_cores(unsigned shards) {
  const cpu_set_t allowed = tandem::allowed_cpus();
  std::string cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed)) cpus += (cpus.empty() ? "" : ",") + std::to_string(cpu);
  std::string cores;
  for (unsigned core = 0; core <= shards; ++core)
    cores += (core == 0 ? "" : ",") + std::to_string(core) + "@(" + cpus + ")";
  return cores;
}

tandem::Status start_eal(const char* program, const Options& options) {
  std::vector<std::string> words{program,
                                 "--lcores=" + logical_cores(options.shards),
                                 "--no-pci",
                                 "--iova-mode=va",
                                 "--no-telemetry",
                                 "--log-level=lib.eal:error",
                                 "--file-prefix=" + options.file_prefix};
  if (options.hugepages) {
    words.insert(words.end(), {"--in-memory"});
  } else {
    words.insert(words.end(), {"--no-huge", "-m", "16", "--no-shconf"});
  }
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  if (::rte_eal_init(static_cast<int>(arguments.size()), arguments.data()) < 0)
    return tandem::fail(
        tandem::ErrorKind::kSystem,
        std::string("start DPDK's environment: ") + ::rte_strerror(rte_errno) +
            (options.hugepages ? "; check /proc/meminfo for free huge pages or set hugepages = \"never\"" : ""));
  return {};
}

// DPDK's interrupt thread has no device to wait for here. A process that dies wakes each of its threads first, on the
// CPU that its heir waits for: 16 us for one that sleeps on another CPU of a nested virtual machine.
// If it stays, that is all that it costs.
void end_interrupt_thread() {
  ::rte_eal_alarm_set(
      1, [](void*) { ::pthread_exit(nullptr); }, nullptr);
}

int run_shard(void* shard) {
  static_cast<tandem::Shard*>(shard)->run();
  return 0;
}

// Code that only a takeover runs is mapped before it; else its first packet waits for a page fault every few steps. The
// first object is this program.
void populate_code() {
  ::dl_iterate_phdr(
      [](dl_phdr_info* object, std::size_t, void*) {
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const auto& part = object->dlpi_phdr[i];
          if (part.p_type == PT_LOAD && (part.p_flags & PF_W) == 0)
            tandem::populate(reinterpret_cast<const void*>(object->dlpi_addr + part.p_vaddr), part.p_memsz, false);
        }
        return 1;
      },
      nullptr);
}

tandem::Status serve(const char* program, const Options& options) {
  if (auto checked = tandem::check_unprivileged(options.allow_root); !checked) return checked;
  if (auto started = start_eal(program, options); !started) return started;
  end_interrupt_thread();
  if (auto installed = tandem::install_guest_fault_handler(); !installed) return installed;
  tandem::Controller controller{tandem::FdChannel{tandem::UniqueFd{options.control_fd}}};
  if (auto greeted = controller.greet(::rte_get_tsc_hz()); !greeted) return greeted;
  auto& shards = controller.shards();
  if (shards.size() != options.shards)
    return tandem::fail(tandem::ErrorKind::kInvalid, "start backend: --shards differs from the supervisor's greeting");
  for (unsigned i = 0; i < shards.size(); ++i) {
    if (::rte_eal_remote_launch(run_shard, shards[i].get(), i + 1) != 0)
      return tandem::fail(tandem::ErrorKind::kSystem, "start poll thread " + std::to_string(i));
    while (shards[i]->thread_id() == 0) std::this_thread::yield();
  }
  populate_code();
  if (auto confined = tandem::confine_backend(); !confined) return confined;
  return controller.run();
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"One process of a Tandem pair: a DPDK backend that is active or warm standby. Started by tandemd."};
  app.set_version_flag("--version", std::string("tandem-backend ") + TANDEM_VERSION);
  app.add_option("--control-fd", options.control_fd, "descriptor of the control channel to tandemd")->required();
  app.add_option("--shards", options.shards, "poll threads")->check(CLI::Range(1u, tandem::kMaxShards));
  app.add_flag("--hugepages", options.hugepages, "take DPDK's own memory from huge pages");
  app.add_option("--file-prefix", options.file_prefix, "DPDK's --file-prefix");
  app.add_flag("--allow-root", options.allow_root, "start although privileged (tests)");
  CLI11_PARSE(app, argc, argv);
  if (auto served = serve(argv[0], options); !served) {
    std::fprintf(stderr, "tandem-backend: %s\n", served.error().text.c_str());
    return 1;
  }
  // The poll threads may still be at work: leave without unwinding what they use.
  std::fflush(nullptr);
  ::_exit(0);
}
