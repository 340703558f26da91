// SPDX-License-Identifier: Apache-2.0
// bpffs: mount, directories, pin and open.
#include "recovery/fence/pins.hpp"

#include <bpf/bpf.h>
#include <linux/magic.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <filesystem>

namespace tandem {
namespace {

namespace fs = std::filesystem;
constexpr const char* kBpffs = "/sys/fs/bpf";
constexpr const char* kMountRemedy =
    "needs root and a kernel with CONFIG_BPF_SYSCALL=y; mount it by hand to see more: mount -t bpf bpf /sys/fs/bpf";

bool is_below(const fs::path& path, const fs::path& parent) {
  const fs::path rest = path.lexically_normal().lexically_relative(parent);
  return !rest.empty() && rest != "." && *rest.begin() != "..";
}

bool is_bpffs(const fs::path& path) {
  struct statfs info {};
  return ::statfs(path.c_str(), &info) == 0 && static_cast<unsigned long>(info.f_type) == BPF_FS_MAGIC;
}

}  // namespace

Status make_pin_directory(const std::string& directory) {
  const fs::path path = fs::path{directory}.lexically_normal();
  if (is_below(path, kBpffs) && !is_bpffs(kBpffs) &&
      ::mount("bpf", kBpffs, "bpf", MS_NOSUID | MS_NODEV, "mode=0700") != 0)
    return fail_errno("mount the BPF file system on /sys/fs/bpf", kMountRemedy);
  fs::path existing = path;
  while (existing.has_relative_path() && !fs::exists(existing)) existing = existing.parent_path();
  if (!is_bpffs(existing))
    return fail(ErrorKind::kInvalid, "make pin directory " + directory + ": " + existing.string() +
                                         " is not on a BPF file system; choose a directory below /sys/fs/bpf");
  fs::path step;
  for (const fs::path& part : path) {
    step /= part;
    if (is_below(step, existing) && ::mkdir(step.c_str(), 0700) != 0 && errno != EEXIST)
      return fail_errno("make pin directory " + step.string(), "needs root; bpffs allows no '.' in names");
  }
  return {};
}

Status pin_object(int fd, const std::string& path) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) return fail_errno("replace pin " + path);
  if (::bpf_obj_pin(fd, path.c_str()) != 0) return fail_errno("pin " + path, "needs root and a BPF file system");
  return {};
}

Result<UniqueFd> open_pin(const std::string& path) {
  UniqueFd fd{::bpf_obj_get(path.c_str())};
  if (fd) return fd;
  if (errno == ENOENT) return fail(ErrorKind::kGone, "open pin " + path + ": it does not exist");
  return fail_errno("open pin " + path, errno == EPERM ? "needs root" : "");
}

Status remove_pin_directory(const std::string& directory) {
  fs::path path = fs::path{directory}.lexically_normal();
  std::error_code error;
  // Only pins (files) and this directory: never a tree, so that a wrong path can do little harm.
  for (const auto& entry : fs::directory_iterator{path, error})
    if (entry.is_regular_file(error) && ::unlink(entry.path().c_str()) != 0)
      return fail_errno("remove pin " + entry.path().string());
  while (is_below(path, kBpffs) && ::rmdir(path.c_str()) == 0) path = path.parent_path();
  return {};
}

}  // namespace tandem
