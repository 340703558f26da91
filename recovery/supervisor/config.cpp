// SPDX-License-Identifier: Apache-2.0
// TOML to Config, refusing what it does not know: a misspelt key must not be silently a default.
#include "recovery/supervisor/config.hpp"

#include <sched.h>
#include <toml++/toml.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>

namespace tandem {

namespace {

using Setter = std::function<Status(const toml::node&)>;

tl::unexpected<Error> wrong(const std::string& why) { return fail(ErrorKind::kInvalid, why); }

Setter text(std::string& target) {
  return [&target](const toml::node& node) -> Status {
    const auto value = node.value<std::string>();
    if (!node.is_string() || !value) return wrong("wants a string");
    target = *value;
    return {};
  };
}

template <class Enum>
Setter choice(Enum& target, std::map<std::string, Enum> names) {
  return [&target, names = std::move(names)](const toml::node& node) -> Status {
    const auto value = node.value<std::string>();
    const auto found = names.find(node.is_string() && value ? *value : "");
    if (found != names.end()) {
      target = found->second;
      return {};
    }
    std::string known;
    for (const auto& [name, ignored] : names) known += (known.empty() ? "\"" : ", \"") + name + "\"";
    return wrong("wants one of " + known);
  };
}

template <class Number>
Setter number(Number& target, Number low, Number high) {
  return [&target, low, high](const toml::node& node) -> Status {
    const auto value = node.value<std::int64_t>();
    if (!node.is_integer() || !value || *value < low || *value > high)
      return wrong("wants a number from " + std::to_string(low) + " to " + std::to_string(high));
    target = static_cast<Number>(*value);
    return {};
  };
}

Setter cpu_list(std::vector<std::uint32_t>& target) {
  return [&target](const toml::node& node) -> Status {
    const auto refused = [] { return wrong("wants a list of different CPU numbers, as in [2, 3]"); };
    const toml::array* array = node.as_array();
    if (array == nullptr) return refused();
    target.clear();
    for (const toml::node& entry : *array) {
      const auto value = entry.value<std::int64_t>();
      if (!entry.is_integer() || !value || *value < 0 || *value >= CPU_SETSIZE ||
          std::count(target.begin(), target.end(), static_cast<std::uint32_t>(*value)) != 0)
        return refused();
      target.push_back(static_cast<std::uint32_t>(*value));
    }
    return {};
  };
}

void flatten(const toml::table& table, const std::string& prefix, std::map<std::string, const toml::node*>& keys) {
  for (const auto& [key, node] : table) {
    const std::string name = prefix + std::string(key.str());
    if (const toml::table* inner = node.as_table())
      flatten(*inner, name + ".", keys);
    else
      keys[name] = &node;
  }
}

}  // namespace

Result<Config> parse_config(const std::string& source, const std::string& origin) {
  toml::table table;
  try {
    table = toml::parse(source);
  } catch (const toml::parse_error& error) {
    return wrong("read " + origin + ", line " + std::to_string(error.source().begin.line) + ": " +
                 std::string(error.description()));
  }
  Config config;
  std::string pin_dir;
  const std::map<std::string, Setter> setters{
      {"instance", text(config.instance)},
      {"run_dir", text(config.run_dir)},
      {"incident_dir", text(config.incident_dir)},
      {"pin_dir", text(pin_dir)},
      {"log_level",
       choice<std::string>(
           config.log_level,
           {{"trace", "trace"}, {"debug", "debug"}, {"info", "info"}, {"warning", "warning"}, {"error", "error"}})},
      {"backend.path", text(config.backend_path)},
      {"backend.user", text(config.backend_user)},
      {"qemu.socket_user", text(config.socket_user)},
      {"qemu.socket_group", text(config.socket_group)},
      {"pair.shards", number<std::uint32_t>(config.shards, 1, kMaxShards)},
      {"parking.kills", number<std::uint32_t>(config.parking_kills, 0, 1000)},
      {"parking.window_s", number<std::uint32_t>(config.parking_window_s, 1, 86'400)},
      {"pair.nice", number<std::int32_t>(config.nice, -20, 19)},
      {"pair.cpus", cpu_list(config.cpus)},
      {"pair.busy_poll", number<std::uint16_t>(config.busy_poll, 0, 256)},
      {"pair.heirs",
       choice<Heirs>(config.heirs,
                     {{"ordinary", Heirs::kOrdinary}, {"real-time", Heirs::kRealTime}, {"polling", Heirs::kPolling}})},
      {"pair.polling",
       choice<Polling>(config.polling, {{"adaptive", Polling::kAdaptive}, {"always", Polling::kAlways}})},
      {"pair.hugepages",
       choice<Hugepages>(config.hugepages,
                         {{"auto", Hugepages::kAuto}, {"always", Hugepages::kAlways}, {"never", Hugepages::kNever}})},
  };
  std::map<std::string, const toml::node*> keys;
  flatten(table, "", keys);
  for (const auto& [name, node] : keys) {
    const std::string where = "read " + origin + ", line " + std::to_string(node->source().begin.line) + ", " + name;
    const auto setter = setters.find(name);
    if (setter == setters.end()) return wrong(where + ": no such setting; see config/tandemd.toml for the known ones");
    if (auto set = setter->second(*node); !set) return within(where, std::move(set.error()));
  }
  for (const char character : config.instance)
    if (std::isalnum(static_cast<unsigned char>(character)) == 0 && character != '-' && character != '_')
      return wrong("read " + origin + ", instance: only letters, digits, - and _ are allowed");
  if (config.instance.empty() || config.instance.size() > 32)
    return wrong("read " + origin + ", instance: wants 1 to 32 characters");
  const bool two_lists = config.heirs == Heirs::kPolling;
  if (!config.cpus.empty() && config.cpus.size() != config.shards * (two_lists ? 2 : 1))
    return wrong(
        "read " + origin + ", pair.cpus: wants " +
        (two_lists
             ? "two CPUs for each of pair.shards, because heirs poll too: those of one backend, then those of the other"
             : "one CPU for each of pair.shards"));
  if (config.busy_poll != 0 && config.polling != Polling::kAlways)
    return wrong(
        "read " + origin +
        ", pair.busy_poll: wants pair.polling = \"always\", for it holds back the interrupts that would wake an "
        "owner that sleeps; set that, or pair.busy_poll = 0");
  config.pin_dir = pin_dir.empty() ? "/sys/fs/bpf/tandem/" + config.instance : pin_dir;
  return config;
}

Result<Config> read_config(const std::string& path) {
  std::ifstream file(path);
  if (!file) return fail_errno("read the configuration " + path, "give another file with --config");
  std::ostringstream content;
  content << file.rdbuf();
  return parse_config(content.str(), path);
}

}  // namespace tandem
