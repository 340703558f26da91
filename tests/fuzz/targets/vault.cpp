// SPDX-License-Identifier: Apache-2.0
// A whole vault between a tandemd and front ends, all of which say anything at any time. Input: steps, see step().
#include "recovery/vault/vault.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "tests/fuzz/targets/descriptors.hpp"

using namespace tandem;
using namespace tandem::fuzz;

namespace {

constexpr const char* kNics[] = {"a", "b"};

const Descriptors& descriptors() {
  static const Descriptors made;
  return made;
}

// A socket without a name in any file system, and its address.
UniqueFd listen_somewhere(int type, sockaddr_un& address, socklen_t& size) {
  UniqueFd socket{::socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  address = {};
  address.sun_family = AF_UNIX;
  must_hold(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address.sun_family) == 0 &&
                ::listen(socket.get(), 8) == 0,
            "a socket can be made");
  size = sizeof address;
  ::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&address), &size);
  return socket;
}

UniqueFd connect_to(int type, const sockaddr_un& address, socklen_t size) {
  UniqueFd socket{::socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)};
  ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), size);
  return socket;
}

class Site {
 public:
  Site() {
    Vault::Options options;
    options.listener = listen_somewhere(SOCK_SEQPACKET, attach_, attach_size_);
    auto vault = Vault::create(std::move(options));
    must_hold(vault.has_value(), "a vault can be made");
    vault_ = std::move(*vault);
    for (int i = 0; i < 2; ++i) listeners_[i] = listen_somewhere(SOCK_STREAM, nics_[i], nic_sizes_[i]);
    attach();
    say(VaultType::kHello, {}, 0, 0, {}, {});
    for (int i = 0; i < 2; ++i) {
      const int fd = listeners_[i].get();
      say(VaultType::kListen, kNics[i], 0, 0, {}, {&fd, 1});
    }
    settle();
  }

  // Low four bits: who does what; the fifth: on which nic.
  void step(Input& input) {
    const std::uint8_t what = input.u8();
    const int nic = what >> 4 & 1;
    switch (what & 0xfu) {
      case 0:
        attach();
        break;
      case 1:
        tandemd_ = {};
        break;
      case 2: {  // anything from tandemd
        const auto fds = numbers(input);
        const auto bytes = input.take(input.u16() % 1024);
        if (!bytes.empty()) static_cast<void>(tandemd_.send(bytes, fds));
        break;
      }
      case 3: {  // something lawful
        const auto fds = numbers(input);
        const auto type = static_cast<VaultType>(1 + input.u8() % 9);
        say(type, kNics[nic], type == VaultType::kClose ? input.u8() : 0,
            type == VaultType::kApplied ? (input.u8() % 2 == 0 ? last_sequence_ : input.u64()) : 0,
            input.take(input.u8()), fds);
        break;
      }
      case 4:
        say(VaultType::kApplied, kNics[nic], 0, last_sequence_, input.take(input.u8()), {});
        break;
      case 5:
        say(VaultType::kFetch, {}, 0, 0, {}, {});
        break;
      case 6:
        say(VaultType::kHello, {}, 0, 0, {}, {});
        break;
      case 7:
        front_ends_[nic] = FdChannel{connect_to(SOCK_STREAM, nics_[nic], nic_sizes_[nic])};
        break;
      case 8:
        front_ends_[nic] = {};
        break;
      case 9:
      case 10: {  // bytes of a front end
        const auto fds = numbers(input);
        const auto bytes = input.take(1 + input.u8());
        if (!bytes.empty()) static_cast<void>(front_ends_[nic].send(bytes, fds));
        break;
      }
      case 11: {  // a whole message of a front end
        const auto fds = numbers(input);
        std::vector<std::byte> message(12);
        const std::uint32_t head[] = {input.u8() % 44u, 1, input.u8()};
        std::memcpy(message.data(), head, sizeof head);
        const auto payload = input.take(head[2]);
        message.insert(message.end(), payload.begin(), payload.end());
        static_cast<void>(front_ends_[nic].send(message, fds));
        break;
      }
      case 12:
        drain(front_ends_[nic]);
        break;
      case 13: {
        const int fd = listeners_[nic].get();
        say(VaultType::kListen, kNics[nic], 0, 0, {}, {&fd, 1});
        break;
      }
      default:
        listen();
        break;
    }
    settle();
  }

 private:
  void attach() { tandemd_ = FdChannel{connect_to(SOCK_SEQPACKET, attach_, attach_size_)}; }

  void say(VaultType type, std::string_view name, std::uint64_t connection, std::uint64_t sequence,
           std::span<const std::byte> body, std::span<const int> fds) {
    const auto bytes = encode_vault_message(type, name, connection, sequence, body, fds.size());
    if (bytes) static_cast<void>(tandemd_.send(*bytes, fds));
  }

  static std::vector<int> numbers(Input& input) {
    std::vector<int> fds;
    for (const std::byte kind : input.take(input.u8() % 12))
      if (const int fd = descriptors().get(std::to_integer<std::uint8_t>(kind)); fd >= 0) fds.push_back(fd);
    return fds;
  }

  // What the vault says is lawful, whatever it was told.
  void listen() {
    for (;;) {
      bool would_block = false;
      auto received = receive_to_the_end(tandemd_, &would_block);
      if (!received) return;
      const auto message = decode_vault_message(std::move(*received), VaultSender::kVault);
      if (!message) std::fprintf(stderr, "%s\n", message.error().text.c_str());
      must_hold(message.has_value(), "the vault keeps to the protocol");
      if (message->sequence != 0) last_sequence_ = message->sequence;
    }
  }
  static void drain(FdChannel& channel) {
    for (int i = 0; i < 16 && channel.receive(); ++i) {
    }
  }

  void settle() {
    for (int i = 0; i < 64; ++i) {
      const auto stepped = vault_->step(0);
      must_hold(stepped.has_value(), "the vault goes on");
      if (!*stepped) return;
    }
  }

  std::unique_ptr<Vault> vault_;
  sockaddr_un attach_{}, nics_[2]{};
  socklen_t attach_size_ = 0, nic_sizes_[2]{};
  UniqueFd listeners_[2];
  FdChannel tandemd_;
  FdChannel front_ends_[2];
  std::uint64_t last_sequence_ = 1;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  descriptors();
  const DescriptorCheck all_closed;
  Input input(data, size);
  {
    Site site;
    for (int steps = 0; !input.empty() && steps < 100; ++steps) site.step(input);
  }
  return 0;
}
