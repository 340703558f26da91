// SPDX-License-Identifier: Apache-2.0
// libnl-route calls behind owning pointers and Results.
#include "recovery/uplink/rtnetlink.hpp"

#include <linux/if.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <netlink/errno.h>
#include <netlink/netlink.h>
#include <netlink/route/addr.h>
#include <netlink/route/link.h>
#include <netlink/route/link/veth.h>
#include <netlink/socket.h>

namespace tandem {
namespace {

struct PutLink {
  void operator()(rtnl_link* link) const noexcept { rtnl_link_put(link); }
};
struct FreeCache {
  void operator()(nl_cache* cache) const noexcept { nl_cache_free(cache); }
};
using LinkPointer = std::unique_ptr<rtnl_link, PutLink>;
using CachePointer = std::unique_ptr<nl_cache, FreeCache>;

tl::unexpected<Error> fail_netlink(const std::string& doing, int error) {
  const char* remedy = error == -NLE_PERM || error == -NLE_NOACCESS ? "; needs root (CAP_NET_ADMIN)" : "";
  return fail(ErrorKind::kSystem, doing + ": " + nl_geterror(error) + remedy);
}

std::string text_of(const char* text) { return text == nullptr ? std::string{} : std::string{text}; }

LinkState state_of(rtnl_link* link) {
  LinkState state;
  state.ifindex = static_cast<std::uint32_t>(rtnl_link_get_ifindex(link));
  state.master = static_cast<std::uint32_t>(rtnl_link_get_master(link));
  state.mtu = rtnl_link_get_mtu(link);
  state.rx_queues = rtnl_link_get_num_rx_queues(link);
  state.up = (rtnl_link_get_flags(link) & IFF_UP) != 0;
  state.carrying = rtnl_link_get_operstate(link) == IF_OPER_UP;
  state.loopback = (rtnl_link_get_flags(link) & IFF_LOOPBACK) != 0;
  state.name = text_of(rtnl_link_get_name(link));
  state.kind = text_of(rtnl_link_get_type(link));
  state.alias = text_of(rtnl_link_get_ifalias(link));
  return state;
}

bool is_global(nl_addr* address) {
  if (nl_addr_get_family(address) != AF_INET6 || nl_addr_get_len(address) != sizeof(in6_addr)) return true;
  const auto* bytes = static_cast<const std::uint8_t*>(nl_addr_get_binary_addr(address));
  return !(bytes[0] == 0xfe && (bytes[1] & 0xc0) == 0x80);
}

}  // namespace

void Rtnetlink::Close::operator()(nl_sock* socket) const noexcept { nl_socket_free(socket); }

Result<Rtnetlink> Rtnetlink::open() {
  Rtnetlink made{nl_socket_alloc()};
  if (made.socket_ == nullptr) return fail(ErrorKind::kSystem, "open rtnetlink: out of memory");
  if (const int error = nl_connect(made.socket_.get(), NETLINK_ROUTE); error < 0)
    return fail_netlink("open rtnetlink", error);
  return made;
}

Result<std::optional<LinkState>> Rtnetlink::find(std::uint32_t ifindex, const char* name) {
  rtnl_link* raw = nullptr;
  const int error = rtnl_link_get_kernel(socket_.get(), static_cast<int>(ifindex), name, &raw);
  const LinkPointer link{raw};
  if (error == -NLE_NODEV || error == -NLE_OBJ_NOTFOUND) return std::nullopt;
  if (error < 0)
    return fail_netlink("look up netdev " + (name != nullptr ? text_of(name) : std::to_string(ifindex)), error);
  return state_of(link.get());
}

Result<std::optional<LinkState>> Rtnetlink::find(const std::string& name) {
  // The kernel answers a name that is too long with "numerical result out of range"; no such link exists.
  if (name.empty() || name.size() >= IFNAMSIZ) return std::nullopt;
  return find(0, name.c_str());
}

Result<std::optional<LinkState>> Rtnetlink::find(std::uint32_t ifindex) { return find(ifindex, nullptr); }

Result<std::vector<LinkState>> Rtnetlink::all() {
  nl_cache* raw = nullptr;
  if (const int error = rtnl_link_alloc_cache(socket_.get(), AF_UNSPEC, &raw); error < 0)
    return fail_netlink("list netdevs", error);
  const CachePointer cache{raw};
  std::vector<LinkState> links;
  for (nl_object* object = nl_cache_get_first(cache.get()); object != nullptr; object = nl_cache_get_next(object))
    links.push_back(state_of(reinterpret_cast<rtnl_link*>(object)));
  return links;
}

Result<bool> Rtnetlink::has_address(std::uint32_t ifindex) {
  nl_cache* raw = nullptr;
  if (const int error = rtnl_addr_alloc_cache(socket_.get(), &raw); error < 0)
    return fail_netlink("list addresses", error);
  const CachePointer cache{raw};
  for (nl_object* object = nl_cache_get_first(cache.get()); object != nullptr; object = nl_cache_get_next(object)) {
    auto* address = reinterpret_cast<rtnl_addr*>(object);
    if (static_cast<std::uint32_t>(rtnl_addr_get_ifindex(address)) == ifindex &&
        is_global(rtnl_addr_get_local(address)))
      return true;
  }
  return false;
}

Status Rtnetlink::add_veth(const VethPlan& plan) {
  const LinkPointer link{rtnl_link_veth_alloc()};
  if (link == nullptr) return fail(ErrorKind::kSystem, "make a veth pair: out of memory");
  rtnl_link* peer = rtnl_link_veth_get_peer(link.get());
  for (rtnl_link* end : {link.get(), peer}) {
    rtnl_link_set_name(end, end == peer ? plan.peer.c_str() : plan.name.c_str());
    rtnl_link_set_mtu(end, plan.mtu);
    rtnl_link_set_num_rx_queues(end, plan.queues);
    rtnl_link_set_num_tx_queues(end, plan.queues);
  }
  const int error = rtnl_link_add(socket_.get(), link.get(), NLM_F_CREATE | NLM_F_EXCL);
  // rtnl_link_veth_get_peer() took a reference.
  rtnl_link_put(peer);
  const std::string doing = "make the veth pair " + plan.name + ", " + plan.peer;
  if (error == -NLE_EXIST) return fail(ErrorKind::kInvalid, doing + ": a netdev of that name exists");
  if (error < 0) return fail_netlink(doing, error);
  return {};
}

Status Rtnetlink::change(std::uint32_t ifindex, const LinkChange& change) {
  const std::string doing = "change netdev " + std::to_string(ifindex);
  // The request carries all flags, so it starts from those the link has: libnl sends no mask, and the kernel would take
  // flags that are left out as "clear", or as no change at all when none is set.
  rtnl_link* raw = nullptr;
  if (const int error = rtnl_link_get_kernel(socket_.get(), static_cast<int>(ifindex), nullptr, &raw); error < 0)
    return fail_netlink(doing, error);
  const LinkPointer now{raw};
  const LinkPointer wanted{rtnl_link_alloc()};
  if (wanted == nullptr) return fail(ErrorKind::kSystem, doing + ": out of memory");
  if (change.up && *change.up) rtnl_link_set_flags(wanted.get(), IFF_UP);
  if (change.up && !*change.up) rtnl_link_unset_flags(wanted.get(), IFF_UP);
  if (change.master) rtnl_link_set_master(wanted.get(), static_cast<int>(*change.master));
  if (change.alias) rtnl_link_set_ifalias(wanted.get(), change.alias->c_str());
  if (const int error = rtnl_link_change(socket_.get(), now.get(), wanted.get(), 0); error < 0)
    return fail_netlink(doing, error);
  return {};
}

Status Rtnetlink::remove(std::uint32_t ifindex) {
  const LinkPointer link{rtnl_link_alloc()};
  if (link == nullptr) return fail(ErrorKind::kSystem, "remove a netdev: out of memory");
  rtnl_link_set_ifindex(link.get(), static_cast<int>(ifindex));
  const int error = rtnl_link_delete(socket_.get(), link.get());
  if (error < 0 && error != -NLE_NODEV && error != -NLE_OBJ_NOTFOUND)
    return fail_netlink("remove netdev " + std::to_string(ifindex), error);
  return {};
}

}  // namespace tandem
