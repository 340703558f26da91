// SPDX-License-Identifier: Apache-2.0
// Rows, quantiles, JSON and the table on the screen.
#include "tests/soak/report.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace tandem::test {

namespace {

using nlohmann::json;

constexpr std::size_t kMostTexts = 50, kMostOutliers = 10;

json harm_json(const Load::Count& harm) {
  return {{"lost", harm.tally.lost},
          {"duplicated", harm.tally.duplicated},
          {"reordered", harm.tally.reordered},
          {"corrupt", harm.tally.corrupt},
          {"ring_errors", harm.ring_errors}};
}

// Absent stages count as 0: an incident without them is reported as unexpected anyway.
std::int64_t stage(const json& incident, const char* name) {
  const auto line = incident.find("timeline_ns");
  if (line == incident.end() || !line->contains(name) || !(*line)[name].is_number()) return 0;
  return (*line)[name].get<std::int64_t>();
}

void print_times(const Samples& samples) {
  std::printf(" %8.0f %8.0f %8.0f", static_cast<double>(samples.quantile(0.5)) / 1e3,
              static_cast<double>(samples.quantile(0.99)) / 1e3, static_cast<double>(samples.quantile(1)) / 1e3);
}

}  // namespace

std::int64_t Samples::quantile(double p) const {
  if (values_.empty()) return 0;
  std::vector<std::int64_t> sorted(values_);
  std::sort(sorted.begin(), sorted.end());
  const auto rank = static_cast<std::size_t>(std::ceil(p * static_cast<double>(sorted.size())));
  return sorted[std::clamp<std::size_t>(rank, 1, sorted.size()) - 1];
}

json Samples::to_json() const {
  if (values_.empty()) return nullptr;
  const auto us = [this](double p) { return static_cast<double>(quantile(p)) / 1e3; };
  return {{"median", us(0.5)}, {"p99", us(0.99)}, {"max", us(1)}};
}

void SoakReport::add_to(Row& row, const Kill& kill) {
  ++row.count;
  row.gap.add(kill.gap_ns);
  row.control.add(kill.control_ns);
  row.pause.add(kill.pause_ns);
  row.harm.tally += kill.harm.tally;
  row.harm.ring_errors += kill.harm.ring_errors;
  row.unexpected += !kill.unexpected.empty();
  bool replayed = false, forward = false;
  for (const json& incident : kill.incidents) {
    // Until the heir is awake: from the signal; else from the owner's last sign of life; one that slept gave none, and
    // counts from its death.
    const bool asleep = incident.value("owner_state", "") == "asleep";
    std::int64_t from = asleep ? 0 : stage(incident, "last_heartbeat");
    if (kill.struck_ns != 0) from = kill.struck_ns - incident.value("fence_time_ns", std::int64_t{0});
    row.detection.add(stage(incident, "heir_awake") - from);
    row.takeover.add(stage(incident, "replayed") - stage(incident, "heir_awake"));
    replayed = replayed || incident["replayed"].value("armed", false);
    forward = forward || incident["replayed"].value("direction", "") == "forward";
  }
  row.replayed += replayed;
  row.replayed_forwards += forward;
}

void SoakReport::add(const Kill& kill) {
  add_to(rows_[kill.cause], kill);
  add_to(all_, kill);
  outliers_.emplace(kill.gap_ns, json{{"kill", all_.count},
                                      {"cause", kill.cause},
                                      {"gap_us", kill.gap_ns / 1000},
                                      {"control_us", kill.control_ns / 1000},
                                      {"pause_us", kill.pause_ns / 1000},
                                      {"incidents", kill.incidents}});
  if (outliers_.size() > kMostOutliers) outliers_.erase(outliers_.begin());
  if (!kill.unexpected.empty() && unexpected_.size() < kMostTexts)
    unexpected_.push_back("kill " + std::to_string(all_.count) + ", " + kill.cause + ": " + kill.unexpected);
}

bool SoakReport::clean() const {
  return totals_.complete && totals_.count.clean() && totals_.overflow == 0 && all_.unexpected == 0 &&
         totals_.left_behind.empty();
}

json SoakReport::row_json(const Row& row) {
  json out = harm_json(row.harm);
  out["count"] = row.count;
  out["replayed"] = row.replayed;
  out["replayed_forwards"] = row.replayed_forwards;
  out["unexpected"] = row.unexpected;
  out["detection_us"] = row.detection.to_json();
  out["takeover_us"] = row.takeover.to_json();
  out["gap_us"] = row.gap.to_json();
  out["control_us"] = row.control.to_json();
  out["pause_us"] = row.pause.to_json();
  return out;
}

json SoakReport::to_json() const {
  json causes = json::object();
  for (const auto& [cause, row] : rows_) causes[cause] = row_json(row);
  // From the books as they were closed: what got lost between kills is in here as well.
  json total = row_json(all_);
  total.update(harm_json(totals_.count));
  total["sent_to_guests"] = totals_.count.sent_in;
  total["sent_by_guests"] = totals_.count.sent_out;
  total["sent_between_guests"] = totals_.count.sent_between;
  total["sent_to_bridge"] = totals_.sent_to_bridge;
  total["arrived"] = totals_.count.arrived;
  total["stalls"] = totals_.count.stalls;
  total["overflow"] = totals_.overflow;
  total["unasked_failovers"] = totals_.unasked_failovers;
  total["seconds"] = totals_.seconds;
  total["frames_per_second"] = totals_.seconds > 0 ? static_cast<double>(totals_.count.arrived) / totals_.seconds : 0.0;
  total["kills_per_minute"] =
      totals_.kill_seconds > 0 ? 60 * static_cast<double>(all_.count) / totals_.kill_seconds : 0.0;
  json longest = json::array();
  for (auto outlier = outliers_.rbegin(); outlier != outliers_.rend(); ++outlier) longest.push_back(outlier->second);
  return {{"longest_gaps", std::move(longest)}, {"stalls", totals_.stalls},     {"causes", std::move(causes)},
          {"total", std::move(total)},          {"skipped", skipped_},          {"unexpected", unexpected_},
          {"left_behind", totals_.left_behind}, {"complete", totals_.complete}, {"clean", clean()}};
}

void SoakReport::print() const {
  std::printf("us: median, p99, max   %5s  %-26s %-26s %-26s %-26s %s\n", "kills", " detection", " takeover", " gap",
              " control", "lost dup reord corrupt");
  const auto print_row = [](const std::string& name, const Row& row, const Load::Count& harm) {
    std::printf("%-22s %5llu ", name.c_str(), static_cast<unsigned long long>(row.count));
    for (const Samples* samples : {&row.detection, &row.takeover, &row.gap, &row.control}) print_times(*samples);
    std::printf("  %llu %llu %llu %llu%s\n", static_cast<unsigned long long>(harm.tally.lost),
                static_cast<unsigned long long>(harm.tally.duplicated),
                static_cast<unsigned long long>(harm.tally.reordered),
                static_cast<unsigned long long>(harm.tally.corrupt), row.unexpected != 0 ? "  UNEXPECTED" : "");
  };
  for (const auto& [cause, row] : rows_) print_row(cause, row, row.harm);
  for (const auto& [cause, reason] : skipped_) std::printf("%-22s skipped: %s\n", cause.c_str(), reason.c_str());
  print_row("total", all_, totals_.count);
  for (const std::string& text : totals_.stalls) std::printf("stalled: %s\n", text.c_str());
  for (const std::string& text : totals_.overflows) std::printf("overflow: %s\n", text.c_str());
  for (const std::string& text : unexpected_) std::printf("unexpected: %s\n", text.c_str());
  const json total = to_json()["total"];
  std::printf(
      "%llu frames to guests, %llu from guests, %llu between them, %.0f/s; %.0f kills a minute; %llu replayed, %llu of "
      "them forwards, overflow %llu, unasked failovers %llu, ring errors %llu, stalls %llu%s%s\n",
      static_cast<unsigned long long>(totals_.count.sent_in), static_cast<unsigned long long>(totals_.count.sent_out),
      static_cast<unsigned long long>(totals_.count.sent_between), total["frames_per_second"].get<double>(),
      total["kills_per_minute"].get<double>(), static_cast<unsigned long long>(all_.replayed),
      static_cast<unsigned long long>(all_.replayed_forwards), static_cast<unsigned long long>(totals_.overflow),
      static_cast<unsigned long long>(totals_.unasked_failovers),
      static_cast<unsigned long long>(totals_.count.ring_errors), static_cast<unsigned long long>(totals_.count.stalls),
      totals_.left_behind.empty() ? "" : "; left behind:", totals_.left_behind.c_str());
  std::printf("%s\n", clean() ? "clean: every frame once, in order, whole" : "FAILED");
  std::fflush(stdout);
}

}  // namespace tandem::test
