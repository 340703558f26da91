// SPDX-License-Identifier: Apache-2.0
// Plain walks along descriptor chains. On purpose not the code of descriptor_chain.hpp.
#include "vhost-net-backend/second_opinion.hpp"

#include <rte_cycles.h>
#include <rte_pause.h>

#include "vhost-net-backend/packed_queue.hpp"
#include "vhost-net-backend/split_queue.hpp"

namespace tandem {

namespace {

// Adds up a chain's buffers, whatever the ring's layout.
class Sum {
 public:
  Sum(const GuestMemory& memory, const ChainNeed& need) : memory_(memory), need_(need) {}
  void add(std::uint64_t address, std::uint32_t length, bool writable) {
    if (enough()) return;
    good_ = good_ && length != 0 && writable == need_.writable && memory_.covers(address, length);
    bytes_ += length;
  }
  void spoil() { good_ = false; }
  [[nodiscard]] bool enough() const { return good_ && bytes_ >= need_.look; }
  [[nodiscard]] bool is_good() const { return good_ && bytes_ >= need_.least && bytes_ <= need_.most; }

 private:
  const GuestMemory& memory_;
  const ChainNeed& need_;
  std::uint64_t bytes_ = 0;
  bool good_ = true;
};

// An indirect table of `length` bytes: number of entries, or 0 if there can be none such.
std::uint32_t table_entries(std::uint32_t length) {
  const std::uint32_t entries = length / 16;
  return length % 16 == 0 && entries <= kMaxVringSize ? entries : 0;
}

void add_split_table(const GuestMemory& memory, const vring_desc& table, Sum& sum) {
  const std::uint32_t entries = table_entries(table.len);
  if (entries == 0 || !memory.covers(table.addr, table.len)) return sum.spoil();
  std::uint32_t entry = 0;
  for (std::uint32_t count = 0; count < entries; ++count) {
    const std::byte* at = memory.view_again(table.addr + std::uint64_t{entry} * 16, 16);
    if (at == nullptr) return sum.spoil();
    const vring_desc descriptor = read_descriptor_once(at);
    if ((descriptor.flags & VRING_DESC_F_INDIRECT) != 0) return sum.spoil();
    sum.add(descriptor.addr, descriptor.len, (descriptor.flags & VRING_DESC_F_WRITE) != 0);
    if ((descriptor.flags & VRING_DESC_F_NEXT) == 0) return;
    entry = descriptor.next;
    if (entry >= entries) return sum.spoil();
    if (sum.enough()) return;
  }
  sum.spoil();
}

void add_packed_table(const GuestMemory& memory, const vring_packed_desc& table, Sum& sum) {
  const std::uint32_t entries = table_entries(table.len);
  if (entries == 0) return sum.spoil();
  for (std::uint32_t entry = 0; entry < entries && !sum.enough(); ++entry) {
    const std::byte* at = memory.view_again(table.addr + std::uint64_t{entry} * 16, 16);
    if (at == nullptr) return sum.spoil();
    const vring_packed_desc descriptor = read_packed_descriptor_once(at);
    if ((descriptor.flags & VRING_DESC_F_INDIRECT) != 0) return sum.spoil();
    sum.add(descriptor.addr, descriptor.len, (descriptor.flags & VRING_DESC_F_WRITE) != 0);
  }
}

}  // namespace

template <>
bool chain_is_good(const GuestMemory& memory, const SplitQueue& queue, std::uint16_t position, std::uint32_t,
                   const ChainNeed& need) {
  Sum sum(memory, need);
  std::uint32_t index = queue.avail_head(position);
  for (std::uint32_t count = 0; index < queue.size(); ++count) {
    if (count == queue.size()) return false;
    const vring_desc descriptor = queue.descriptor(static_cast<std::uint16_t>(index));
    if ((descriptor.flags & VRING_DESC_F_INDIRECT) != 0) {
      if (!queue.indirect_allowed() || (descriptor.flags & VRING_DESC_F_NEXT) != 0) return false;
      add_split_table(memory, descriptor, sum);
      return sum.is_good();
    }
    sum.add(descriptor.addr, descriptor.len, (descriptor.flags & VRING_DESC_F_WRITE) != 0);
    if ((descriptor.flags & VRING_DESC_F_NEXT) == 0) return sum.is_good();
    index = descriptor.next;
    if (index < queue.size() && sum.enough()) return sum.is_good();
  }
  return false;
}

template <>
bool chain_is_good(const GuestMemory& memory, const PackedQueue& queue, std::uint16_t position, std::uint32_t taken,
                   const ChainNeed& need) {
  Sum sum(memory, need);
  for (std::uint32_t count = 0; taken + count < queue.size(); ++count) {
    const vring_packed_desc descriptor = queue.descriptor(PackedQueue::index(position));
    if (!PackedQueue::is_available(descriptor.flags, position)) return false;
    const bool more = (descriptor.flags & VRING_DESC_F_NEXT) != 0;
    if ((descriptor.flags & VRING_DESC_F_INDIRECT) != 0) {
      if (!queue.indirect_allowed() || count != 0 || more) return false;
      add_packed_table(memory, descriptor, sum);
    } else {
      sum.add(descriptor.addr, descriptor.len, (descriptor.flags & VRING_DESC_F_WRITE) != 0);
    }
    if (!more) return sum.is_good();
    position = queue.next(position, 1);
  }
  return false;
}

template <>
bool supply_is_plausible(const SplitQueue& queue, std::uint16_t next_avail, std::uint16_t) {
  const std::uint32_t index = queue.avail_index();
  return (index + 0x10000u - next_avail) % 0x10000u <= queue.size();
}

template <>
bool supply_is_plausible(const PackedQueue& queue, std::uint16_t next_avail, std::uint16_t next_used) {
  return PackedQueue::index(next_avail) < queue.size() && PackedQueue::index(next_used) < queue.size();
}

void wait_a_moment() {
  for (std::uint64_t left = rte_rdtsc() >> 3 & 0x3f; left > 0; --left) rte_pause();
}

}  // namespace tandem
