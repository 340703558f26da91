// SPDX-License-Identifier: Apache-2.0
// Seals: a checksum over what a queue pair is wired to, so that a pointer that a wild store has moved is not followed
// for longer than one burst.
//
// Pointers into rings and guest memory are made once, when a description is put in force, and then stay as they are.
// Each class that holds some folds them into one word at the end of its making, and is_whole() does so again. An owner
// looks before it arms (nothing was promised yet), before it disarms (an heir applies the record again, with pointers
// of its own), and at every beat. The fold is a sum without order: it sees every change of one word, not a deliberate
// one. Thread: any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace tandem {

/// XOR of the words of `object`, which has no padding. In one expression: a loop would be left as one.
template <class T>
std::uint64_t fold(const T& object) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(std::uint64_t) == 0);
  const auto word = [at = reinterpret_cast<const std::byte*>(&object)](std::size_t n) {
    std::uint64_t value = 0;
    std::memcpy(&value, at + n * sizeof value, sizeof value);
    return value;
  };
  return [&]<std::size_t... N>(std::index_sequence<N...>) { return (word(N) ^ ...); }
  (std::make_index_sequence<sizeof(T) / sizeof(std::uint64_t)>{});
}

}  // namespace tandem
