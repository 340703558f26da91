// SPDX-License-Identifier: Apache-2.0
// Loading, pinning and the map operations of the fence.
#include "recovery/fence/fence.hpp"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <memory>

#include "fence.skel.h"
#include "recovery/fence/kernel_version.hpp"
#include "recovery/fence/pins.hpp"
#include "recovery/fence/thread_identity.hpp"

namespace tandem {
namespace {

constexpr std::array<const char*, 3> kLinkPins = {"link_signal", "link_exit", "link_exec"};
constexpr const char* kWatchPin = "watch";
constexpr const char* kSlotsPin = "slots";
constexpr const char* kRingsPin = "rings";

struct SkeletonDeleter {
  void operator()(fence_bpf* skeleton) const noexcept { fence_bpf__destroy(skeleton); }
};
using Skeleton = std::unique_ptr<fence_bpf, SkeletonDeleter>;

// libbpf explains failures only through its log callback: the last warnings go into the error text.
thread_local std::string libbpf_warnings;

[[gnu::format(printf, 2, 0)]] int keep_warnings(libbpf_print_level level, const char* format, va_list arguments) {
  constexpr std::size_t kKeep = 2000;
  if (level != LIBBPF_WARN || libbpf_warnings.size() > kKeep) return 0;
  std::array<char, 512> line{};
  const int length = std::vsnprintf(line.data(), line.size(), format, arguments);
  libbpf_warnings.append(line.data());
  return length;
}

class LibbpfLog {
 public:
  LibbpfLog() : before_(libbpf_set_print(keep_warnings)) { libbpf_warnings.clear(); }
  ~LibbpfLog() { libbpf_set_print(before_); }
  LibbpfLog(const LibbpfLog&) = delete;
  LibbpfLog& operator=(const LibbpfLog&) = delete;

 private:
  libbpf_print_fn_t before_;
};

tl::unexpected<Error> load_failure(const std::string& doing, int error) {
  const char* remedy = "see the BPF log below";
  auto kind = ErrorKind::kSystem;
  if (error == EPERM || error == EACCES) {
    remedy = "run as root (CAP_BPF, CAP_PERFMON) outside containers, with kernel lockdown not in confidentiality mode";
  } else if (error == ENOSYS) {
    kind = ErrorKind::kUnsupported;
    remedy = "this kernel has no bpf(): it needs CONFIG_BPF_SYSCALL=y, as distribution kernels have";
  } else if (error == ESRCH || error == ENOENT || error == EINVAL || error == ENOTSUP) {
    kind = ErrorKind::kUnsupported;
    remedy =
        "this kernel lacks what the fence needs: CONFIG_BPF_SYSCALL, CONFIG_BPF_EVENTS, CONFIG_TRACEPOINTS and "
        "CONFIG_DEBUG_INFO_BTF, as Debian 12's backports kernel and Debian 13's have";
  }
  std::string text = doing + ": " + std::strerror(error) + "; " + remedy;
  if (!libbpf_warnings.empty()) text += "\n" + libbpf_warnings;
  return fail(kind, std::move(text));
}

Status check_host() {
  if (auto supported = kernel_is_supported(running_kernel_release()); !supported) return supported;
  if (::geteuid() != 0) return fail(ErrorKind::kSystem, "load the fence: not root; only root may load BPF programs");
  if (::access("/sys/kernel/btf/vmlinux", R_OK) != 0)
    return fail(ErrorKind::kUnsupported,
                "load the fence: this kernel has no type information in /sys/kernel/btf/vmlinux; use a kernel with "
                "CONFIG_DEBUG_INFO_BTF=y, as Debian's are, with /sys mounted");
  // include/linux/proc_ns.h: PROC_PID_INIT_INO. Tids seen from any other namespace are not those the programs see.
  std::array<char, 64> target{};
  if (::readlink("/proc/self/ns/pid", target.data(), target.size() - 1) < 0 ||
      std::string_view{target.data()} != "pid:[4026531836]")
    return fail(
        ErrorKind::kUnsupported,
        "load the fence: this process is not in the host's pid namespace; run the supervisor on the host, or in a "
        "container with the host's pid namespace");
  return {};
}

Result<Skeleton> open_and_attach() {
  Skeleton skeleton{fence_bpf__open()};
  if (!skeleton) return load_failure("open the fence's BPF programs", errno);
  if (const int error = fence_bpf__load(skeleton.get()); error != 0)
    return load_failure("load the fence's BPF programs", -error);
  // From here on only the programs can write slots: nobody got an fd of the map before.
  if (::bpf_map_freeze(bpf_map__fd(skeleton->maps.slots)) != 0) return load_failure("freeze the fence's slots", errno);
  if (const int error = fence_bpf__attach(skeleton.get()); error != 0)
    return load_failure("attach the fence to the signal and exit tracepoints", -error);
  return skeleton;
}

Status pin_all(const fence_bpf& skeleton, const std::string& directory) {
  const std::array<std::pair<const char*, int>, 6> objects = {{
      {kWatchPin, bpf_map__fd(skeleton.maps.watch)},
      {kSlotsPin, bpf_map__fd(skeleton.maps.slots)},
      {kRingsPin, bpf_map__fd(skeleton.maps.rings)},
      {kLinkPins[0], bpf_link__fd(skeleton.links.on_signal)},
      {kLinkPins[1], bpf_link__fd(skeleton.links.on_exit)},
      {kLinkPins[2], bpf_link__fd(skeleton.links.on_exec)},
  }};
  for (const auto& [name, fd] : objects)
    if (auto pinned = pin_object(fd, directory + "/" + name); !pinned) return pinned;
  return {};
}

struct MapLayout {
  std::uint32_t type;
  std::uint32_t value_size;
  std::uint32_t entries;
};

Result<UniqueFd> open_map(const std::string& path, const MapLayout& expected) {
  auto fd = open_pin(path);
  if (!fd) return fd;
  bpf_map_info info{};
  std::uint32_t size = sizeof info;
  if (::bpf_obj_get_info_by_fd(fd->get(), &info, &size) != 0) return fail_errno("inspect pinned map " + path);
  if (info.type != expected.type || info.key_size != sizeof(std::uint32_t) || info.value_size != expected.value_size ||
      info.max_entries != expected.entries)
    return fail(ErrorKind::kUnsupported,
                "adopt pinned map " + path +
                    ": another version of Tandem made it; stop the pairs that it watches, then "
                    "start this version clean");
  return fd;
}

}  // namespace

Result<Fence> Fence::load(const std::string& pin_dir) {
  if (auto host = check_host(); !host) return tl::make_unexpected(std::move(host.error()));
  if (auto removed = remove_pin_directory(pin_dir); !removed)
    return within("load the fence", std::move(removed.error()));
  if (auto made = make_pin_directory(pin_dir); !made) return within("load the fence", std::move(made.error()));
  const LibbpfLog log;
  auto skeleton = open_and_attach();
  Status pinned;
  if (skeleton) pinned = pin_all(**skeleton, pin_dir);
  if (!skeleton || !pinned) {
    (void)remove_pin_directory(pin_dir);
    return within("load the fence", std::move(skeleton ? pinned.error() : skeleton.error()));
  }
  return adopt(pin_dir);
}

Result<Fence> Fence::adopt(const std::string& pin_dir) {
  Fence fence;
  fence.pin_dir_ = pin_dir;
  const auto open_into = [&pin_dir](UniqueFd& into, const char* name, const MapLayout& layout) -> Status {
    auto fd = open_map(pin_dir + "/" + name, layout);
    if (!fd) return within("adopt the fence", std::move(fd.error()));
    into = std::move(*fd);
    return {};
  };
  Status opened =
      open_into(fence.watch_, kWatchPin, {BPF_MAP_TYPE_HASH, sizeof(tandem_fence_watch), TANDEM_FENCE_SLOTS});
  if (opened)
    opened = open_into(fence.slots_, kSlotsPin, {BPF_MAP_TYPE_ARRAY, sizeof(tandem_fence_slot), TANDEM_FENCE_SLOTS});
  if (opened)
    opened =
        open_into(fence.rings_, kRingsPin, {BPF_MAP_TYPE_ARRAY_OF_MAPS, sizeof(std::uint32_t), TANDEM_FENCE_RINGS});
  if (!opened) return tl::make_unexpected(std::move(opened.error()));
  for (std::size_t i = 0; i < kLinkPins.size(); ++i) {
    auto link = open_pin(pin_dir + "/" + kLinkPins[i]);
    if (!link) return within("adopt the fence", std::move(link.error()));
    fence.links_[i] = std::move(*link);
  }
  auto view = FenceView::map(fence.slots_.get());
  if (!view) return within("adopt the fence", std::move(view.error()));
  fence.view_ = std::move(*view);
  return fence;
}

Status Fence::refuse_shared_slot(pid_t tid, std::uint64_t tag) const {
  std::uint32_t key = 0;
  tandem_fence_watch other{};
  // An entry that trips during the walk may make it start over; at most a few dozen exist, so it ends.
  for (const std::uint32_t* previous = nullptr; ::bpf_map_get_next_key(watch_.get(), previous, &key) == 0;
       previous = &key) {
    if (::bpf_map_lookup_elem(watch_.get(), &key, &other) != 0) continue;
    if (other.tag % TANDEM_FENCE_SLOTS != tag % TANDEM_FENCE_SLOTS && key != static_cast<std::uint32_t>(tid)) continue;
    return fail(ErrorKind::kInvalid, "watch thread " + std::to_string(tid) + " as incarnation " + std::to_string(tag) +
                                         ": thread " + std::to_string(key) + " is watched as " +
                                         std::to_string(other.tag) + ", in the same slot or under the same tid");
  }
  return {};
}

Status Fence::watch(pid_t tid, std::uint64_t tag, std::uint32_t ring, pid_t process) {
  const std::string doing = "watch thread " + std::to_string(tid);
  if (tag == 0) return fail(ErrorKind::kInvalid, doing + ": incarnation 0 means nobody");
  if (dead(tag))
    return fail(ErrorKind::kInvalid, doing + ": incarnation " + std::to_string(tag) + " is dead; give out a new one");
  if (auto unique = refuse_shared_slot(tid, tag); !unique) return unique;
  const auto before = identify_thread(tid, process);
  if (!before) return within(doing, before.error());
  if (before->exiting) return fail(ErrorKind::kGone, doing + ": it is already exiting");

  const auto key = static_cast<std::uint32_t>(tid);
  const tandem_fence_watch entry{tag, ring, 0};
  if (::bpf_map_update_elem(watch_.get(), &key, &entry, BPF_NOEXIST) != 0) return fail_errno(doing);
  // The exit tracepoint runs after PF_EXITING is set. Not set now means: it is still to come and will find the entry.
  const auto after = identify_thread(tid, process);
  if (after && !after->exiting && after->same_thread(*before)) return {};
  if (auto ended = unwatch(tid); !ended) return ended;
  if (!after && after.error().kind != ErrorKind::kGone) return within(doing, after.error());
  return fail(ErrorKind::kGone, doing + ": it died before the watch was confirmed");
}

Status Fence::set_ring(pid_t tid, std::uint64_t tag, std::uint32_t ring) {
  const std::string doing = "change the heir of thread " + std::to_string(tid);
  const auto key = static_cast<std::uint32_t>(tid);
  tandem_fence_watch entry{};
  const bool found = ::bpf_map_lookup_elem(watch_.get(), &key, &entry) == 0;
  if (!found && errno != ENOENT) return fail_errno(doing);
  if (!found || entry.tag != tag)
    return fail(ErrorKind::kGone, doing + ": incarnation " + std::to_string(tag) + " is not watched any more");
  entry.ring = ring;
  // BPF_EXIST: a thread that dies in between is not watched anew.
  if (::bpf_map_update_elem(watch_.get(), &key, &entry, BPF_EXIST) == 0) return {};
  if (errno == ENOENT) return fail(ErrorKind::kGone, doing + ": it died meanwhile");
  return fail_errno(doing);
}

Status Fence::unwatch(pid_t tid) {
  const auto key = static_cast<std::uint32_t>(tid);
  if (::bpf_map_delete_elem(watch_.get(), &key) == 0 || errno == ENOENT) return {};
  return fail_errno("end the watch of thread " + std::to_string(tid));
}

Result<UniqueFd> Fence::slots_fd() const {
  UniqueFd fd = slots_.duplicate();
  if (!fd) return fail_errno("duplicate the fence's slots descriptor");
  return fd;
}

Result<std::uint32_t> Fence::make_ring() {
  // The map itself says which indices are free, so an adopter needs no other record.
  std::uint32_t index = 0;
  std::uint32_t id = 0;
  while (index < TANDEM_FENCE_RINGS && ::bpf_map_lookup_elem(rings_.get(), &index, &id) == 0) ++index;
  if (index == TANDEM_FENCE_RINGS)
    return fail(ErrorKind::kInvalid,
                "make a wake-up ring: all " + std::to_string(index) + " are in use; free one first");
  if (errno != ENOENT) return fail_errno("make a wake-up ring");
  const UniqueFd ring{::bpf_map_create(BPF_MAP_TYPE_RINGBUF, "tandem_wake", 0, 0, TANDEM_FENCE_RING_BYTES, nullptr)};
  if (!ring) return fail_errno("make a wake-up ring");
  const int fd = ring.get();
  if (::bpf_map_update_elem(rings_.get(), &index, &fd, BPF_ANY) != 0) return fail_errno("register a wake-up ring");
  return index;
}

Result<UniqueFd> Fence::ring_fd(std::uint32_t index) const {
  std::uint32_t id = 0;
  if (::bpf_map_lookup_elem(rings_.get(), &index, &id) != 0) {
    if (errno == ENOENT)
      return fail(ErrorKind::kGone, "open wake-up ring " + std::to_string(index) + ": it does not exist");
    return fail_errno("open wake-up ring " + std::to_string(index));
  }
  UniqueFd fd{::bpf_map_get_fd_by_id(id)};
  if (!fd) return fail_errno("open wake-up ring " + std::to_string(index));
  return fd;
}

Status Fence::free_ring(std::uint32_t index) {
  if (::bpf_map_delete_elem(rings_.get(), &index) == 0 || errno == ENOENT) return {};
  return fail_errno("free wake-up ring " + std::to_string(index));
}

std::uint64_t Fence::highest_tag() const noexcept {
  std::uint64_t highest = 0;
  for (std::uint32_t slot = 0; slot < TANDEM_FENCE_SLOTS; ++slot) {
    tandem_fence_slot mark{};
    if (::bpf_map_lookup_elem(slots_.get(), &slot, &mark) == 0) highest = std::max<std::uint64_t>(highest, mark.tag);
  }
  std::uint32_t key = 0;
  tandem_fence_watch entry{};
  for (const std::uint32_t* previous = nullptr; ::bpf_map_get_next_key(watch_.get(), previous, &key) == 0;
       previous = &key)
    if (::bpf_map_lookup_elem(watch_.get(), &key, &entry) == 0) highest = std::max<std::uint64_t>(highest, entry.tag);
  return highest;
}

Status Fence::unpin_all() { return remove_pin_directory(pin_dir_); }

}  // namespace tandem
