// SPDX-License-Identifier: Apache-2.0
// Table layout: two spaces between columns, a rule below the heading, as virsh does it.
#include "recovery/cli/tables.hpp"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <vector>

namespace tandem {

namespace {

using Row = std::vector<std::string>;

std::string lay_out(const std::vector<Row>& rows) {
  std::vector<std::size_t> widths;
  for (const Row& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (std::size_t n = 0; n < rows.size(); ++n) {
    std::string line;
    for (std::size_t i = 0; i < rows[n].size(); ++i)
      line += " " + rows[n][i] + std::string(widths[i] - rows[n][i].size() + 2, ' ');
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
    if (n == 0) {
      std::size_t total = 0;
      for (const std::size_t width : widths) total += width + 3;
      text += std::string(total, '-') + "\n";
    }
  }
  return text;
}

std::string show(const nlohmann::json& value) {
  if (value.is_null()) return "-";
  return value.is_string() ? value.get<std::string>() : value.dump();
}

std::string microseconds(const nlohmann::json& nanoseconds) {
  if (!nanoseconds.is_number()) return "-";
  char text[32];
  std::snprintf(text, sizeof text, "%.1f us", nanoseconds.get<double>() / 1000);
  return text;
}

std::string local_time(std::int64_t milliseconds) {
  const std::time_t seconds = milliseconds / 1000;
  std::tm fields{};
  ::localtime_r(&seconds, &fields);
  char text[32];
  std::strftime(text, sizeof text, "%F %T", &fields);
  return text;
}

}  // namespace

std::string status_table(const nlohmann::json& status) {
  std::vector<Row> pairs{{"Pair", "State", "Active", "Standby", "Epoch", "NICs"}};
  for (const auto& pair : status.at("pairs"))
    pairs.push_back({show(pair["name"]), show(pair["state"]),
                     show(pair["active"]["pid"]) + " " + show(pair["active"]["state"]),
                     show(pair["standby"]["pid"]) + " " + show(pair["standby"]["state"]), show(pair["epoch"]),
                     std::to_string(pair["nics"].size())});
  std::vector<Row> nics{
      {"MAC", "Domain", "Pair", "Uplink", "Link", "RX packets", "TX packets", "Dropped", "Overflow", "Problem"}};
  for (const auto& nic : status.at("nics")) {
    const auto& uplink = nic["uplink"];
    std::string name = "-";
    for (const char* kind : {"bridge", "dev", "null"})
      if (uplink.contains(kind)) name = show(uplink[kind]);
    std::string problem = show(nic["fault"]).empty() ? show(nic["uplink_problem"]) : show(nic["fault"]);
    std::string link = nic["connected"].get<bool>() ? "connected" : "waiting";
    if (const auto disabled = nic.value("disabled", nlohmann::json()); disabled.is_object()) {
      link = disabled["by"] == "tandem" ? "parked" : "disabled";
      problem = show(disabled["reason"]);
    }
    nics.push_back(
        {show(nic["mac"]), show(nic["domain"]), show(nic["pair"]), name, link, show(nic["rx"]["packets"]),
         show(nic["tx"]["packets"]),
         std::to_string(nic["rx"]["dropped"].get<std::uint64_t>() + nic["tx"]["dropped"].get<std::uint64_t>()),
         show(nic["overflow"]), problem.empty() ? "-" : problem});
  }
  return lay_out(pairs) + "\n" + lay_out(nics);
}

std::string incident_table(const nlohmann::json& incidents) {
  std::vector<Row> rows{
      {"Id", "Time", "Pair", "Kind", "Cause", "Owner was", "Heir awake", "Took over", "First packet", "Replayed"}};
  for (const auto& incident : incidents.at("incidents")) {
    const auto& timeline = incident["timeline_ns"];
    const auto& replayed = incident["replayed"];
    rows.push_back({show(incident["id"]), local_time(incident["time_ms"].get<std::int64_t>()), show(incident["pair"]),
                    incident.value("kind", "failover"), show(incident["cause"]), show(incident["owner_state"]),
                    microseconds(timeline["heir_awake"]), microseconds(timeline["replayed"]),
                    microseconds(timeline["first_transaction"]),
                    replayed["armed"].get<bool>() ? show(replayed["packets"]) + " packets" : "nothing"});
  }
  return lay_out(rows);
}

}  // namespace tandem
