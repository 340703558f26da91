// SPDX-License-Identifier: Apache-2.0
// The configuration: what is read, and what is refused with the line and the key.
#include "recovery/supervisor/config.hpp"

#include <catch2/catch.hpp>

using namespace tandem;

namespace {

std::string error_of(const std::string& text) {
  const auto config = parse_config(text, "test.toml");
  INFO(text);
  REQUIRE_FALSE(config.has_value());
  return config.error().text;
}

}  // namespace

TEST_CASE("an empty configuration has the defaults") {
  const auto config = parse_config("", "test.toml");
  REQUIRE(config.has_value());
  CHECK(config->instance == "default");
  CHECK(config->run_dir == "/run/tandem");
  CHECK(config->control_socket() == "/run/tandem/control.sock");
  CHECK(config->vault_socket() == "/run/tandem/vault.sock");
  CHECK(config->nic_socket_dir() == "/run/tandem/nic");
  CHECK(config->pin_dir == "/sys/fs/bpf/tandem/default");
  CHECK(config->shards == 1);
  CHECK(config->polling == Polling::kAdaptive);
  CHECK(config->hugepages == Hugepages::kAuto);
  CHECK(config->cpus.empty());
  CHECK(config->busy_poll == 0);
}

TEST_CASE("the configuration that is shipped says what the defaults are") {
  const auto shipped = read_config(TANDEM_SOURCE_DIR "/config/tandemd.toml");
  INFO((shipped ? std::string{} : shipped.error().text));
  REQUIRE(shipped.has_value());
  const Config defaults;
  CHECK(shipped->instance == defaults.instance);
  CHECK(shipped->run_dir == defaults.run_dir);
  CHECK(shipped->incident_dir == defaults.incident_dir);
  CHECK(shipped->pin_dir == defaults.pin_dir);
  CHECK(shipped->log_level == defaults.log_level);
  CHECK(shipped->backend_path == defaults.backend_path);
  CHECK(shipped->backend_user == defaults.backend_user);
  CHECK(shipped->socket_user == defaults.socket_user);
  CHECK(shipped->socket_group == defaults.socket_group);
  CHECK(shipped->shards == defaults.shards);
  CHECK(shipped->polling == defaults.polling);
  CHECK(shipped->hugepages == defaults.hugepages);
  CHECK(shipped->cpus == defaults.cpus);
  CHECK(shipped->busy_poll == defaults.busy_poll);
  CHECK(shipped->parking_kills == defaults.parking_kills);
  CHECK(shipped->parking_window_s == defaults.parking_window_s);
}

TEST_CASE("every setting can be set") {
  const auto config = parse_config(R"(
instance = "west-2"
run_dir = "/tmp/r"
incident_dir = "/tmp/i"
log_level = "trace"
[backend]
path = "/opt/backend"
user = "nobody"
[qemu]
socket_user = ""
socket_group = "kvm"
[pair]
shards = 8
polling = "always"
heirs = "polling"
cpus = [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 1023]
busy_poll = 64
hugepages = "never"
[parking]
kills = 7
window_s = 300
)",
                                   "test.toml");
  INFO((config ? std::string{} : config.error().text));
  REQUIRE(config.has_value());
  CHECK(config->instance == "west-2");
  CHECK(config->pin_dir == "/sys/fs/bpf/tandem/west-2");
  CHECK(config->run_dir == "/tmp/r");
  CHECK(config->incident_dir == "/tmp/i");
  CHECK(config->log_level == "trace");
  CHECK(config->backend_path == "/opt/backend");
  CHECK(config->backend_user == "nobody");
  CHECK(config->socket_user.empty());
  CHECK(config->socket_group == "kvm");
  CHECK(config->shards == 8);
  CHECK(config->polling == Polling::kAlways);
  CHECK(config->heirs == Heirs::kPolling);
  CHECK(config->cpus == std::vector<std::uint32_t>{0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 1023});
  CHECK(config->busy_poll == 64);
  CHECK(config->hugepages == Hugepages::kNever);
  CHECK(config->parking_kills == 7);
  CHECK(config->parking_window_s == 300);
  CHECK(parse_config("pin_dir = \"/sys/fs/bpf/elsewhere\"", "t")->pin_dir == "/sys/fs/bpf/elsewhere");
}

TEST_CASE("settings that are wrong are refused by name") {
  struct Row {
    const char* text;
    const char* says;
  };
  const Row row = GENERATE(values<Row>({
      {"instanse = \"x\"", "instanse"},
      {"\n\nshards = 2", "line 3"},
      {"[pair]\nshard = 2", "pair.shard"},
      {"[pair]\nshards = 0", "from 1 to 8"},
      {"[pair]\nshards = 9", "from 1 to 8"},
      {"[pair]\nshards = -1", "from 1 to 8"},
      {"[pair]\nshards = 4294967297", "from 1 to 8"},
      {"[pair]\nshards = \"2\"", "wants a number"},
      {"[pair]\nshards = 2.0", "wants a number"},
      {"[pair]\npolling = \"sometimes\"", "\"adaptive\""},
      {"[pair]\npolling = 1", "\"always\""},
      {"[pair]\nheirs = \"always\"", "\"polling\""},
      {"[pair]\nhugepages = true", "\"never\""},
      {"[pair]\ncpus = 2", "wants a list"},
      {"[pair]\ncpus = [\"2\"]", "wants a list"},
      {"[pair]\ncpus = [2.0]", "wants a list"},
      {"[pair]\ncpus = [-1]", "wants a list"},
      {"[pair]\ncpus = [1024]", "wants a list"},
      {"[pair]\nshards = 2\ncpus = [2, 2]", "wants a list"},
      {"[pair]\ncpus = [2, 3]", "one CPU for each"},
      {"[pair]\nheirs = \"polling\"\ncpus = [2]", "two CPUs for each"},
      {"[pair]\npolling = \"always\"\nbusy_poll = 257", "from 0 to 256"},
      {"[pair]\npolling = \"always\"\nbusy_poll = true", "from 0 to 256"},
      {"[pair]\nbusy_poll = 64", "pair.polling"},
      {"[parking]\nkills = -1", "from 0 to 1000"},
      {"[parking]\nkills = 1001", "from 0 to 1000"},
      {"[parking]\nwindow_s = 0", "from 1 to 86400"},
      {"[parking]\nwindow = 60", "parking.window"},
      {"log_level = \"loud\"", "\"debug\""},
      {"instance = 5", "wants a string"},
      {"instance = \"\"", "1 to 32"},
      {"instance = \"a/b\"", "instance"},
      {"instance = \"../x\"", "instance"},
      {"instance = \"123456789012345678901234567890123\"", "1 to 32"},
      {"run_dir = [\"/run\"]", "wants a string"},
      {"instance = \"x", "line 1"},
      {"instance = \"x\"\ninstance = \"y\"", "line 2"},
      {"pair = 3", "pair"},
  }));
  const std::string error = error_of(row.text);
  INFO(error);
  CHECK(error.find(row.says) != std::string::npos);
  CHECK(error.find("test.toml") != std::string::npos);
}

TEST_CASE("a configuration file that is not there") {
  const auto config = read_config("/nonexistent/tandemd.toml");
  REQUIRE_FALSE(config.has_value());
  CHECK(config.error().text.find("/nonexistent/tandemd.toml") != std::string::npos);
  CHECK(config.error().text.find("--config") != std::string::npos);
}
