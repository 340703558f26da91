// SPDX-License-Identifier: Apache-2.0
// Deterministic names.
#include "recovery/uplink/uplink_names.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>

namespace tandem {
namespace {

constexpr std::string_view kPrefix = "tdm";
constexpr std::size_t kDigits = 6;
constexpr std::size_t kMacLength = 17;

bool is_hex(char c) { return std::isxdigit(static_cast<unsigned char>(c)) != 0; }

/// FNV-1a, 32 bits: spreads well enough for a name, and is the same everywhere.
std::uint32_t hash(std::string_view text) {
  std::uint32_t value = 2166136261u;
  for (const char c : text) value = (value ^ static_cast<unsigned char>(c)) * 16777619u;
  return value;
}

}  // namespace

Result<std::string> normalized_mac(std::string_view mac) {
  const auto invalid = [mac](const char* why) {
    return fail(ErrorKind::kInvalid, "read MAC address \"" + std::string{mac} + "\": " + why);
  };
  if (mac.size() != kMacLength) return invalid("not of the form 52:54:00:12:34:56");
  std::string text;
  for (std::size_t i = 0; i < mac.size(); ++i) {
    const bool separator = i % 3 == 2;
    if (separator ? mac[i] != ':' : !is_hex(mac[i])) return invalid("not of the form 52:54:00:12:34:56");
    text += static_cast<char>(std::tolower(static_cast<unsigned char>(mac[i])));
  }
  if (std::string_view{"13579bdf"}.find(text[1]) != std::string_view::npos) return invalid("it is a multicast address");
  if (text == "00:00:00:00:00:00") return invalid("it is all zero");
  return text;
}

std::string veth_name(std::string_view mac, std::uint32_t attempt, char end) {
  std::string digits;
  if (attempt == 0) {
    for (const char c : mac.substr(mac.size() - 8))
      if (c != ':') digits += c;
  } else {
    std::array<char, 16> text{};
    std::snprintf(text.data(), text.size(), "%06x", hash(std::string{mac} + "#" + std::to_string(attempt)) & 0xffffffu);
    digits = text.data();
  }
  return std::string{kPrefix} + digits + end;
}

bool is_veth_name(std::string_view name) {
  return name.size() == kPrefix.size() + kDigits + 1 && name.starts_with(kPrefix) &&
         (name.back() == 'a' || name.back() == 'b') &&
         std::all_of(name.begin() + kPrefix.size(), name.end() - 1, is_hex);
}

std::string uplink_alias(std::string_view instance, std::string_view mac) {
  return "tandem:" + std::string{instance} + ":" + std::string{mac};
}

bool is_alias_of(std::string_view alias, std::string_view instance) {
  const std::string prefix = uplink_alias(instance, "");
  return alias.size() == prefix.size() + kMacLength && alias.starts_with(prefix);
}

std::string pin_name(std::string_view name) {
  std::string text{name};
  std::replace(text.begin(), text.end(), '.', '_');
  return text;
}

}  // namespace tandem
