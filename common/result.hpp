// SPDX-License-Identifier: Apache-2.0
// Result<T>: the one way in which an expected failure travels.
//
// Policy: a function that can fail for a reason outside this process (a peer, an operator, the kernel) returns
// Result<T>. Callers add context on the way up; only main() turns an Error into an exit status. A broken invariant of
// our own code aborts instead: in a backend that is a failover, not an outage.
//
// Text of an error: what was being done, to what, why it failed, and what the reader can do about it.
#pragma once

#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

namespace tandem {

/// What the holder of an Error may conclude from it; the text is for people.
enum class ErrorKind {
  kInvalid,      ///< a peer or an operator sent something that is not allowed; the sender pays (drop, close, refuse)
  kUnsupported,  ///< this kernel, machine or version cannot do it; retrying is useless
  kGone,         ///< the other end went away; reconnecting may help
  kSystem,       ///< a system call failed
};

struct Error {
  ErrorKind kind = ErrorKind::kSystem;
  std::string text;

  /// Puts what the caller was doing in front: "attach uplink br0: create veth pair: Permission denied".
  [[nodiscard]] Error within(std::string_view doing) && {
    text.insert(0, ": ").insert(0, doing);
    return std::move(*this);
  }
};

template <class T>
using Result = tl::expected<T, Error>;
using Status = Result<void>;

inline tl::unexpected<Error> fail(ErrorKind kind, std::string text) {
  return tl::make_unexpected(Error{kind, std::move(text)});
}

/// An Error for a failed system call. `doing` names the call's purpose and object, `remedy` (may be empty) what to do.
inline tl::unexpected<Error> fail_errno(std::string_view doing, std::string_view remedy = {}, int error = errno) {
  std::string text{doing};
  text.append(": ").append(std::strerror(error));
  if (!remedy.empty()) text.append("; ").append(remedy);
  return fail(error == EPIPE || error == ECONNRESET ? ErrorKind::kGone : ErrorKind::kSystem, std::move(text));
}

/// Passes an Error up with context: `return within("start pair default", std::move(result.error()));`
inline tl::unexpected<Error> within(std::string_view doing, Error error) {
  return tl::make_unexpected(std::move(error).within(doing));
}

}  // namespace tandem
