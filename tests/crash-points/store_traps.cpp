// SPDX-License-Identifier: Apache-2.0
// Decoding what is reached, and keeping a breakpoint before everything that matters.
#include "tests/crash-points/store_traps.hpp"

#include <Zydis/Zydis.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace tandem::test {

namespace {

constexpr std::uint8_t kBreakpoint = 0xcc;

[[noreturn]] void give_up(const char* what, std::uint64_t address) {
  std::fprintf(stderr, "trap a child's stores: %s at 0x%llx\n", what, static_cast<unsigned long long>(address));
  std::abort();
}

struct Decoded {
  ZydisDecodedInstruction instruction;
  ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
};

const std::uint8_t* code_at(std::uint64_t address) {
  return reinterpret_cast<const std::uint8_t*>(address);  // NOLINT(performance-no-int-to-ptr)
}

void decode(std::uint64_t address, Decoded& decoded) {
  static const ZydisDecoder decoder = [] {
    ZydisDecoder made;
    if (!ZYAN_SUCCESS(ZydisDecoderInit(&made, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64))) std::abort();
    return made;
  }();
  // No further than the page if the instruction ends there: the next one may not be mapped.
  const std::size_t page = 4096 - address % 4096;
  for (const std::size_t length : {std::min<std::size_t>(page, ZYDIS_MAX_INSTRUCTION_LENGTH),
                                   static_cast<std::size_t>(ZYDIS_MAX_INSTRUCTION_LENGTH)})
    if (ZYAN_SUCCESS(
            ZydisDecoderDecodeFull(&decoder, code_at(address), length, &decoded.instruction, decoded.operands)))
      return;
  give_up("no instruction that the decoder knows", address);
}

bool stores(const Decoded& decoded) {
  const auto& instruction = decoded.instruction;
  switch (instruction.meta.category) {
    case ZYDIS_CATEGORY_SYSCALL:
    case ZYDIS_CATEGORY_SYSTEM:
    case ZYDIS_CATEGORY_INTERRUPT:
      return true;
    default:
      break;
  }
  for (int i = 0; i < instruction.operand_count; ++i) {
    const ZydisDecodedOperand& operand = decoded.operands[i];
    if (operand.type != ZYDIS_OPERAND_TYPE_MEMORY || operand.mem.type == ZYDIS_MEMOP_TYPE_AGEN) continue;
    if ((operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) == 0) continue;
    if (operand.mem.base != ZYDIS_REGISTER_RSP || operand.mem.index != ZYDIS_REGISTER_NONE) return true;
  }
  return false;
}

}  // namespace

bool can_store(std::uint64_t address) {
  Decoded decoded;
  decode(address, decoded);
  return stores(decoded);
}

StoreTraps::StoreTraps(pid_t child)
    : memory_(::open(("/proc/" + std::to_string(child) + "/mem").c_str(), O_RDWR | O_CLOEXEC)) {
  if (!memory_) give_up("its memory cannot be opened", 0);
}

void StoreTraps::write(std::uint64_t address, std::uint8_t byte) const {
  if (::pwrite(memory_.get(), &byte, 1, static_cast<off_t>(address)) != 1)
    give_up("its code cannot be written", address);
}

bool StoreTraps::trapped(std::uint64_t address) const {
  const auto place = places_.find(address);
  return place != places_.end() && place->second != Kind::kPlain;
}

void StoreTraps::plant() {
  if (planted_) return;
  planted_ = true;
  for (const auto& [address, kind] : places_)
    if (kind != Kind::kPlain) write(address, kBreakpoint);
}

void StoreTraps::lift() {
  if (!planted_) return;
  planted_ = false;
  for (const auto& [address, kind] : places_)
    if (kind != Kind::kPlain) write(address, *code_at(address));
}

void StoreTraps::expect(std::uint64_t address) {
  if (places_.try_emplace(address, Kind::kUnknown).second) write(address, kBreakpoint);
}

void StoreTraps::settle(std::uint64_t address, Kind kind) {
  const auto [place, is_new] = places_.try_emplace(address, kind);
  const bool was_trapped = !is_new && place->second != Kind::kPlain;
  place->second = kind;
  if (kind == Kind::kPlain && was_trapped) write(address, *code_at(address));
  if (kind != Kind::kPlain && !was_trapped) write(address, kBreakpoint);
}

void StoreTraps::explore(std::uint64_t address) {
  Decoded decoded;
  for (;;) {
    const auto known = places_.find(address);
    if (known != places_.end() && known->second != Kind::kUnknown) return;
    decode(address, decoded);
    const std::uint64_t next = address + decoded.instruction.length;
    std::uint64_t target = 0;
    bool leads = false, branches = false, falls_through = true;
    switch (decoded.instruction.meta.category) {
      case ZYDIS_CATEGORY_RET:
        leads = true;
        break;
      case ZYDIS_CATEGORY_CALL:
      case ZYDIS_CATEGORY_UNCOND_BR:
      case ZYDIS_CATEGORY_COND_BR:
        branches = ZYAN_SUCCESS(ZydisCalcAbsoluteAddress(&decoded.instruction, &decoded.operands[0], address, &target));
        leads = !branches || decoded.operands[0].type != ZYDIS_OPERAND_TYPE_IMMEDIATE;
        falls_through = decoded.instruction.meta.category != ZYDIS_CATEGORY_UNCOND_BR;
        break;
      default:
        break;
    }
    if (stores(decoded)) return settle(address, Kind::kStores);
    if (leads) return settle(address, Kind::kLeads);
    settle(address, Kind::kPlain);
    if (!branches) {
      address = next;
      continue;
    }
    expect(target);
    // After a call that does not return there need not be an instruction.
    if (falls_through) expect(next);
    return;
  }
}

StoreTraps::Pace StoreTraps::reach(std::uint64_t address) {
  explore(address);
  const Kind kind = places_.at(address);
  if (kind == Kind::kPlain) return Pace::kRun;
  write(address, *code_at(address));
  return kind == Kind::kStores ? Pace::kLook : Pace::kStep;
}

void StoreTraps::rearm(std::uint64_t address) { write(address, kBreakpoint); }

}  // namespace tandem::test
