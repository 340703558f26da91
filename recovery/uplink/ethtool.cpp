// SPDX-License-Identifier: Apache-2.0
// SIOCETHTOOL requests.
#include "recovery/uplink/ethtool.hpp"

#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "common/unique_fd.hpp"

namespace tandem {
namespace {

/// `unsupported`, if given, is set when the driver has no such operation (the call then fails too).
Status request(const std::string& name, void* command, const std::string& doing, bool* unsupported = nullptr) {
  const UniqueFd socket{::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  if (!socket) return fail_errno(doing + " of " + name);
  ifreq query{};
  if (name.size() >= sizeof query.ifr_name) return fail(ErrorKind::kInvalid, doing + ": netdev name too long: " + name);
  std::memcpy(query.ifr_name, name.c_str(), name.size());
  query.ifr_data = static_cast<char*>(command);
  if (::ioctl(socket.get(), SIOCETHTOOL, &query) == 0) return {};
  if (unsupported != nullptr) *unsupported = errno == EOPNOTSUPP;
  return fail_errno(doing + " of " + name);
}

/// A structure with a flexible array at its end, in a buffer of its own.
template <class Header>
class Variable {
 public:
  Variable(std::uint32_t command, std::size_t tail_bytes) : bytes_(sizeof(Header) + tail_bytes) {
    get()->cmd = command;
  }
  Header* get() { return reinterpret_cast<Header*>(bytes_.data()); }
  std::byte* tail() { return bytes_.data() + sizeof(Header); }

 private:
  std::vector<std::byte> bytes_;
};

Result<std::vector<std::string>> feature_names(const std::string& name) {
  Variable<ethtool_sset_info> info{ETHTOOL_GSSET_INFO, sizeof(std::uint32_t)};
  info.get()->sset_mask = 1ull << ETH_SS_FEATURES;
  if (auto done = request(name, info.get(), "count features"); !done) return tl::make_unexpected(done.error());
  std::uint32_t count = 0;
  if (info.get()->sset_mask != 0) std::memcpy(&count, info.tail(), sizeof count);
  Variable<ethtool_gstrings> strings{ETHTOOL_GSTRINGS, std::size_t{count} * ETH_GSTRING_LEN};
  strings.get()->string_set = ETH_SS_FEATURES;
  strings.get()->len = count;
  if (auto done = request(name, strings.get(), "list features"); !done) return tl::make_unexpected(done.error());
  std::vector<std::string> names;
  for (std::uint32_t i = 0; i < count; ++i) {
    const char* text = reinterpret_cast<const char*>(strings.tail()) + std::size_t{i} * ETH_GSTRING_LEN;
    names.emplace_back(text, ::strnlen(text, ETH_GSTRING_LEN));
  }
  return names;
}

constexpr std::uint32_t kBlockBits = 32;

/// Sets the features at `positions` (indices in feature_names()) to `on`.
Status set_features(const std::string& name, const std::vector<std::size_t>& positions, std::size_t total, bool on) {
  const std::size_t blocks = (total + kBlockBits - 1) / kBlockBits;
  Variable<ethtool_sfeatures> change{ETHTOOL_SFEATURES, blocks * sizeof(ethtool_set_features_block)};
  change.get()->size = static_cast<std::uint32_t>(blocks);
  std::vector<ethtool_set_features_block> wanted(blocks);
  for (const std::size_t position : positions) {
    const std::uint32_t bit = 1u << (position % kBlockBits);
    wanted[position / kBlockBits].valid |= bit;
    if (on) wanted[position / kBlockBits].requested |= bit;
  }
  std::memcpy(change.tail(), wanted.data(), blocks * sizeof(ethtool_set_features_block));
  return request(name, change.get(), on ? "switch features on" : "switch features off");
}

}  // namespace

Result<std::vector<NetdevFeature>> netdev_features(const std::string& name) {
  const auto names = feature_names(name);
  if (!names) return tl::make_unexpected(names.error());
  const std::size_t blocks = (names->size() + kBlockBits - 1) / kBlockBits;
  Variable<ethtool_gfeatures> query{ETHTOOL_GFEATURES, blocks * sizeof(ethtool_get_features_block)};
  query.get()->size = static_cast<std::uint32_t>(blocks);
  if (auto done = request(name, query.get(), "read features"); !done) return tl::make_unexpected(done.error());
  std::vector<ethtool_get_features_block> values(blocks);
  std::memcpy(values.data(), query.tail(), blocks * sizeof(ethtool_get_features_block));
  std::vector<NetdevFeature> features;
  for (std::size_t i = 0; i < names->size(); ++i) {
    const ethtool_get_features_block& block = values[i / kBlockBits];
    const std::uint32_t bit = 1u << (i % kBlockBits);
    const bool changeable = (block.available & bit) != 0 && (block.never_changed & bit) == 0;
    features.push_back({(*names)[i], (block.active & bit) != 0, changeable});
  }
  return features;
}

Result<std::vector<std::string>> switch_features_off(const std::string& name,
                                                     const std::vector<std::string>& prefixes) {
  const auto features = netdev_features(name);
  if (!features) return tl::make_unexpected(features.error());
  std::vector<std::size_t> positions;
  std::vector<std::string> were_on;
  for (std::size_t i = 0; i < features->size(); ++i) {
    const NetdevFeature& feature = (*features)[i];
    const bool named = std::any_of(prefixes.begin(), prefixes.end(),
                                   [&](const std::string& prefix) { return feature.name.starts_with(prefix); });
    if (!named || !feature.active || !feature.changeable) continue;
    positions.push_back(i);
    were_on.push_back(feature.name);
  }
  if (positions.empty()) return were_on;
  if (auto done = set_features(name, positions, features->size(), false); !done)
    return tl::make_unexpected(done.error());
  return were_on;
}

Status switch_features_on(const std::string& name, const std::vector<std::string>& wanted) {
  const auto names = feature_names(name);
  if (!names) return tl::make_unexpected(names.error());
  std::vector<std::size_t> positions;
  for (std::size_t i = 0; i < names->size(); ++i)
    if (std::find(wanted.begin(), wanted.end(), (*names)[i]) != wanted.end()) positions.push_back(i);
  return positions.empty() ? Status{} : set_features(name, positions, names->size(), true);
}

Result<Channels> channels(const std::string& name) {
  ethtool_channels query{};
  query.cmd = ETHTOOL_GCHANNELS;
  bool unsupported = false;
  if (const auto done = request(name, &query, "read the channels", &unsupported); !done && !unsupported)
    return tl::make_unexpected(done.error());
  return Channels{query.rx_count, query.tx_count, query.combined_count, query.max_rx, query.max_tx, query.max_combined};
}

Status set_channels(const std::string& name, const Channels& wanted) {
  ethtool_channels change{};
  change.cmd = ETHTOOL_GCHANNELS;
  // Read first: the request carries the counts of other queues, which stay as they are.
  if (auto done = request(name, &change, "read the channels"); !done) return done;
  change.cmd = ETHTOOL_SCHANNELS;
  change.rx_count = wanted.rx;
  change.tx_count = wanted.tx;
  change.combined_count = wanted.combined;
  return request(name, &change, "set the channels");
}

}  // namespace tandem
