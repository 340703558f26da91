// SPDX-License-Identifier: Apache-2.0
// Reads and checks the domain-XML option with pugixml.
#include "vmm/domain_option.hpp"

#include <net/if.h>

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <optional>
#include <pugixml.hpp>

#include "common/layout/device_description.hpp"

namespace tandem {
namespace {

using pugi::xml_attribute;
using pugi::xml_node;

/// libvirt's own limit for messages is far higher, but no real domain comes near this.
constexpr std::size_t kMaxDomainXml = 4u << 20;
constexpr std::size_t kMaxNics = 64;
constexpr std::size_t kMaxPairName = 32;
constexpr std::size_t kMaxQuoted = 80;
/// An Ethernet header and something in it, to what a frame of the usual MTU holds with two VLAN tags.
constexpr std::uint32_t kShortestSourceFrame = 60;
constexpr std::uint32_t kLongestSourceFrame = 1522;

/// Text from the XML for an error message: short, printable.
std::string quoted(std::string_view text) {
  std::string result = "'";
  for (const char c : text.substr(0, kMaxQuoted)) result += (c >= ' ' && c < 0x7f) ? c : '?';
  if (text.size() > kMaxQuoted) result += "...";
  return result + "'";
}

/// UTF-8 without control characters: what goes into logs, JSON and tables. pugixml makes bytes of any character
/// reference, surrogates too.
bool is_plain_text(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i++]);
    if (lead < 0x20 || lead == 0x7f) return false;
    if (lead < 0x80) continue;
    const int more = lead >= 0xc2 && lead < 0xe0   ? 1
                     : lead >= 0xe0 && lead < 0xf0 ? 2
                     : lead >= 0xf0 && lead < 0xf5 ? 3
                                                   : 0;
    if (more == 0 || text.size() - i < static_cast<std::size_t>(more)) return false;
    std::uint32_t code = lead & (0x3fu >> more);
    for (int n = 0; n < more; ++n) {
      const auto next = static_cast<unsigned char>(text[i++]);
      if ((next & 0xc0u) != 0x80) return false;
      code = code << 6 | (next & 0x3fu);
    }
    constexpr std::uint32_t kSmallest[] = {0, 0x80, 0x800, 0x10000};
    if (code < kSmallest[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
  }
  return true;
}

tl::unexpected<Error> wrong(std::string text) { return fail(ErrorKind::kInvalid, std::move(text)); }

// ---- namespaces (pugixml has none) ----

std::string_view local_name(std::string_view name) {
  const std::size_t colon = name.find(':');
  return colon == std::string_view::npos ? name : name.substr(colon + 1);
}

/// The namespace URI of an element: the nearest xmlns or xmlns:prefix declaration on it or above it.
std::string_view namespace_of(xml_node element) {
  const std::string_view name = element.name();
  const std::size_t colon = name.find(':');
  const std::string declaration =
      colon == std::string_view::npos ? "xmlns" : "xmlns:" + std::string{name.substr(0, colon)};
  for (xml_node node = element; node; node = node.parent())
    if (const xml_attribute found = node.attribute(declaration.c_str())) return found.value();
  return {};
}

bool is_ours(xml_node element) { return namespace_of(element) == kDomainNamespace; }

bool is_declaration(std::string_view attribute) { return attribute == "xmlns" || attribute.starts_with("xmlns:"); }

/// Only these attributes, and no text.
Status check_shape(xml_node element, std::initializer_list<std::string_view> attributes) {
  for (const xml_attribute attribute : element.attributes()) {
    if (is_declaration(attribute.name())) continue;
    if (std::find(attributes.begin(), attributes.end(), attribute.name()) == attributes.end())
      return wrong("unknown attribute " + quoted(attribute.name()) + " of <" + element.name() + ">; remove it");
  }
  for (const xml_node child : element.children())
    if (child.type() == pugi::node_pcdata || child.type() == pugi::node_cdata)
      return wrong("unexpected text " + quoted(child.value()) + " in <" + element.name() + ">; remove it");
  return {};
}

Status unknown_element(xml_node element, std::string_view parent) {
  return wrong("unknown element <" + std::string{element.name()} + "> in <" + std::string{parent} + ">; remove it");
}

// ---- values ----

/// "52:54:00:AB:cd:ef" in lower case; nullopt if it is not six colon-separated bytes.
std::optional<std::string> normal_mac(std::string_view text) {
  constexpr std::size_t kLength = 17;
  if (text.size() != kLength) return std::nullopt;
  std::string mac;
  for (std::size_t i = 0; i < kLength; ++i) {
    char c = text[i];
    if (c >= 'A' && c <= 'F') c = static_cast<char>(c - 'A' + 'a');
    const bool hex = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
    if (i % 3 == 2 ? c != ':' : !hex) return std::nullopt;
    mac += c;
  }
  return mac;
}

bool is_unicast(std::string_view mac) {
  constexpr std::string_view kGroupDigits = "13579bdf";  // the least significant bit of the first byte
  return kGroupDigits.find(mac[1]) == std::string_view::npos && mac != "00:00:00:00:00:00";
}

Result<std::chrono::nanoseconds> parse_duration(std::string_view text, std::string_view attribute) {
  struct Unit {
    std::string_view name;
    std::uint64_t nanoseconds;
  };
  constexpr Unit kUnits[] = {{"us", 1'000}, {"ms", 1'000'000}, {"s", 1'000'000'000}};
  constexpr std::uint64_t kLow = 1'000'000;
  constexpr std::uint64_t kHigh = 10'000'000'000;
  const std::string advice = "; write a whole number with a unit (us, ms or s) from 1ms to 10s, as in 5ms";
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const std::string_view unit = text.substr(static_cast<std::size_t>(end - text.data()));
  if (error == std::errc{})
    for (const Unit& known : kUnits)
      if (unit == known.name && number <= kHigh / known.nanoseconds && number * known.nanoseconds >= kLow)
        return std::chrono::nanoseconds{number * known.nanoseconds};
  return wrong("watchdog " + std::string{attribute} + "=" + quoted(text) + advice);
}

/// The kernel's rule (dev_valid_name), without what would need quoting in a shell or an XML file.
bool is_interface_name(std::string_view name) {
  if (name.empty() || name.size() >= IFNAMSIZ || name == "." || name == "..") return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
           c == '-' || c == '@';
  });
}

bool is_pair_name(std::string_view name) {
  if (name.empty() || name.size() > kMaxPairName || name.front() == '.' || name.front() == '-') return false;
  return name.find('@') == std::string_view::npos && std::all_of(name.begin(), name.end(), [](char c) {
           return is_interface_name({&c, 1}) || c == '.';
         });
}

// ---- our elements ----

/// null='sink', null='source' with frame='64', null='loopback': uplinks for measurement.
Result<UplinkOption> parse_null(xml_node element) {
  struct Word {
    std::string_view text;
    UplinkOption::Kind kind;
  };
  constexpr Word kWords[] = {{"sink", UplinkOption::Kind::kSink},
                             {"source", UplinkOption::Kind::kSource},
                             {"loopback", UplinkOption::Kind::kLoopback}};
  const std::string_view value = element.attribute("null").value();
  const auto* word = std::find_if(std::begin(kWords), std::end(kWords), [&](const Word& w) { return w.text == value; });
  if (word == std::end(kWords))
    return wrong("uplink null=" + quoted(value) + "; write null='sink', 'source' or 'loopback'");
  UplinkOption option{word->kind, std::string{value}, 0, false};
  const xml_attribute frame = element.attribute("frame");
  if (option.kind != UplinkOption::Kind::kSource) {
    if (frame) return wrong("<uplink> has an attribute frame, which goes with null='source' only; remove it");
    return option;
  }
  const std::string_view text = frame ? frame.value() : "64";
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), option.frame_length);
  if (error != std::errc{} || end != text.data() + text.size() || option.frame_length < kShortestSourceFrame ||
      option.frame_length > kLongestSourceFrame)
    return wrong("uplink frame=" + quoted(text) + "; write a length in bytes from " +
                 std::to_string(kShortestSourceFrame) + " to " + std::to_string(kLongestSourceFrame));
  return option;
}

Result<UplinkOption> parse_uplink(xml_node element) {
  if (auto shape = check_shape(element, {"bridge", "dev", "null", "frame", "direct"}); !shape)
    return tl::make_unexpected(std::move(shape.error()));
  for (const xml_node child : element.children())
    if (child.type() == pugi::node_element) return tl::make_unexpected(unknown_element(child, element.name()).error());
  std::vector<UplinkOption> found;
  if (const auto bridge = element.attribute("bridge"))
    found.push_back({UplinkOption::Kind::kBridge, bridge.value(), 0, true});
  if (const auto device = element.attribute("dev"))
    found.push_back({UplinkOption::Kind::kDevice, device.value(), 0, false});
  if (element.attribute("null")) {
    auto null = parse_null(element);
    if (!null) return tl::make_unexpected(std::move(null.error()));
    found.push_back(std::move(*null));
  } else if (element.attribute("frame")) {
    return wrong("<uplink> has an attribute frame, which goes with null='source' only; remove it");
  }
  if (found.size() != 1)
    return wrong("<uplink> has " + std::to_string(found.size()) +
                 " of the attributes bridge, dev and null; give exactly one, as in <tandem:uplink bridge='br0'/>");
  if (!found.front().is_null() && !is_interface_name(found.front().name))
    return wrong("uplink " + quoted(found.front().name) + " is not a network interface name: 1 to " +
                 std::to_string(IFNAMSIZ - 1) + " letters, digits, '.', '_', '-' or '@'");
  if (const auto direct = element.attribute("direct")) {
    const std::string_view value = direct.value();
    if (found.front().kind != UplinkOption::Kind::kBridge)
      return wrong("<uplink> has an attribute direct, which goes with bridge= only; remove it");
    if (value != "yes" && value != "no") return wrong("uplink direct=" + quoted(value) + "; write 'yes' or 'no'");
    found.front().direct = value == "yes";
  }
  return found.front();
}

Result<WatchdogOption> parse_watchdog(xml_node element) {
  if (auto shape = check_shape(element, {"spin", "blocked"}); !shape)
    return tl::make_unexpected(std::move(shape.error()));
  for (const xml_node child : element.children())
    if (child.type() == pugi::node_element) return tl::make_unexpected(unknown_element(child, element.name()).error());
  WatchdogOption watchdog;
  for (auto& [name, limit] : {std::pair{"spin", &watchdog.spin}, std::pair{"blocked", &watchdog.blocked}}) {
    const xml_attribute attribute = element.attribute(name);
    if (!attribute) continue;
    auto duration = parse_duration(attribute.value(), name);
    if (!duration) return tl::make_unexpected(std::move(duration.error()));
    *limit = *duration;
  }
  return watchdog;
}

Result<std::string> parse_nic_mac(xml_node nic) {
  const xml_attribute attribute = nic.attribute("mac");
  if (!attribute) return wrong("a <nic> has no mac attribute; give it the MAC address of the interface it is for");
  const auto mac = normal_mac(attribute.value());
  if (!mac || !is_unicast(*mac))
    return wrong("nic mac=" + quoted(attribute.value()) +
                 " is not the address of a network card; write six bytes, as in 52:54:00:12:34:56");
  return *mac;
}

/// The NIC's own element: what stands in our namespace. The rest of the domain is looked at by fit_domain().
Status parse_nic_body(xml_node element, NicOption& nic) {
  if (auto shape = check_shape(element, {"mac", "pair"}); !shape) return shape;
  if (const auto pair = element.attribute("pair")) nic.pair = pair.value();
  if (!is_pair_name(nic.pair))
    return wrong("pair=" + quoted(nic.pair) + " is not a pair name: 1 to " + std::to_string(kMaxPairName) +
                 " letters, digits, '.', '_' or '-'");
  std::size_t uplinks = 0;
  std::size_t watchdogs = 0;
  for (const xml_node child : element.children()) {
    if (child.type() != pugi::node_element) continue;
    const std::string_view name = local_name(child.name());
    if (is_ours(child) && name == "uplink") {
      auto uplink = parse_uplink(child);
      if (!uplink) return tl::make_unexpected(std::move(uplink.error()));
      nic.uplink = *uplink;
      ++uplinks;
    } else if (is_ours(child) && name == "watchdog") {
      auto watchdog = parse_watchdog(child);
      if (!watchdog) return tl::make_unexpected(std::move(watchdog.error()));
      nic.watchdog = *watchdog;
      ++watchdogs;
    } else {
      return unknown_element(child, element.name());
    }
  }
  if (uplinks != 1)
    return wrong("it has " + std::to_string(uplinks) +
                 " <uplink> elements; give exactly one, as in <tandem:uplink bridge='br0'/>");
  if (watchdogs > 1) return wrong("it has more than one <watchdog>; keep one");
  return {};
}

Result<NicOption> parse_nic(xml_node element) {
  NicOption nic;
  auto mac = parse_nic_mac(element);
  if (!mac) return tl::make_unexpected(std::move(mac.error()));
  nic.mac = *mac;
  if (auto body = parse_nic_body(element, nic); !body) return within("NIC " + nic.mac, std::move(body.error()));
  return nic;
}

// ---- the rest of the domain ----

std::string socket_path(std::string_view run_directory, std::string mac) {
  std::replace(mac.begin(), mac.end(), ':', '-');
  return std::string{run_directory} + "/nic/" + mac + ".sock";
}

/// The one <interface> with this MAC.
Result<xml_node> find_interface(xml_node domain, const std::string& mac) {
  std::vector<xml_node> found;
  for (const xml_node interface : domain.child("devices").children("interface")) {
    const auto address = normal_mac(interface.child("mac").attribute("address").value());
    if (address == mac) found.push_back(interface);
  }
  if (found.empty())
    return wrong("no <interface> has this MAC address; add <interface type='vhostuser'> with <mac address='" + mac +
                 "'/>");
  if (found.size() > 1) return wrong("more than one <interface> has this MAC address; make them different");
  return found.front();
}

Status fit_source(xml_node interface, const std::string& path) {
  const xml_node source = interface.child("source");
  const std::string wanted = "<source type='unix' path='" + path + "' mode='client'>";
  if (source.attribute("type").value() != std::string_view{"unix"} || source.attribute("path").value() != path)
    return wrong("its interface has source path " + quoted(source.attribute("path").value()) + "; write " + wanted);
  if (source.attribute("mode").value() != std::string_view{"client"})
    return wrong("its interface has source mode " + quoted(source.attribute("mode").value()) + "; write " + wanted);
  if (source.child("reconnect").attribute("enabled").value() != std::string_view{"yes"})
    return wrong("its interface does not reconnect; put <reconnect enabled='yes' timeout='1'/> into <source>");
  return {};
}

Result<std::uint32_t> parse_queues(xml_node interface) {
  const xml_attribute attribute = interface.child("driver").attribute("queues");
  if (!attribute) return 1u;
  const std::string_view text = attribute.value();
  std::uint32_t queues = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), queues);
  if (error != std::errc{} || end != text.data() + text.size() || queues == 0 || queues > kMaxQueuePairsPerDevice)
    return wrong("its interface has driver queues=" + quoted(text) + "; write a number from 1 to " +
                 std::to_string(kMaxQueuePairsPerDevice));
  return queues;
}

Status fit_interface(xml_node domain, NicOption& nic) {
  auto interface = find_interface(domain, nic.mac);
  if (!interface) return tl::make_unexpected(std::move(interface.error()));
  if (const std::string_view type = interface->attribute("type").value(); type != "vhostuser")
    return wrong("its interface has type " + quoted(type) + "; write <interface type='vhostuser'>");
  if (const std::string_view model = interface->child("model").attribute("type").value(); model != "virtio")
    return wrong("its interface has model " + quoted(model) + "; write <model type='virtio'/>");
  if (auto source = fit_source(*interface, nic.socket_path); !source) return source;
  auto queues = parse_queues(*interface);
  if (!queues) return tl::make_unexpected(std::move(queues.error()));
  nic.queues = *queues;
  return {};
}

/// vhost-user works on memory that both sides map: every NUMA cell shared by itself or by the domain's default.
Status fit_memory(xml_node domain) {
  const xml_node backing = domain.child("memoryBacking");
  const std::string_view source = backing.child("source").attribute("type").value();
  const bool from_file = source == "memfd" || source == "file" || backing.child("hugepages");
  const bool shared_by_default =
      from_file && std::string_view{backing.child("access").attribute("mode").value()} == "shared";
  bool has_cells = false;
  bool all_shared = true;
  for (const xml_node cell : domain.child("cpu").child("numa").children("cell")) {
    has_cells = true;
    const xml_attribute access = cell.attribute("memAccess");
    all_shared = all_shared && (access ? std::string_view{access.value()} == "shared" : shared_by_default);
  }
  if (has_cells ? all_shared : shared_by_default) return {};
  return wrong(
      "the domain's memory is not shared with other processes; write <memoryBacking><source type='memfd'/>"
      "<access mode='shared'/></memoryBacking>, and no memAccess='private' in a NUMA cell");
}

/// Our element in <metadata>: none is fine, two are not, and nothing else of ours may stand there.
Result<xml_node> find_option(xml_node domain) {
  xml_node option;
  for (const xml_node child : domain.child("metadata").children()) {
    if (child.type() != pugi::node_element || !is_ours(child)) continue;
    if (local_name(child.name()) != "domain") return tl::make_unexpected(unknown_element(child, "metadata").error());
    if (option) return wrong("<metadata> has two elements <" + std::string{child.name()} + ">; keep one");
    option = child;
  }
  return option;
}

Status parse_nics(xml_node option, DomainOption& result) {
  if (auto shape = check_shape(option, {}); !shape) return shape;
  for (const xml_node child : option.children()) {
    if (child.type() != pugi::node_element) continue;
    if (!is_ours(child) || local_name(child.name()) != "nic") return unknown_element(child, option.name());
    auto nic = parse_nic(child);
    if (!nic) return tl::make_unexpected(std::move(nic.error()));
    for (const NicOption& other : result.nics)
      if (other.mac == nic->mac) return wrong("NIC " + nic->mac + " is named twice; keep one <nic>");
    if (result.nics.size() == kMaxNics) return wrong("more than " + std::to_string(kMaxNics) + " <nic> elements");
    result.nics.push_back(std::move(*nic));
  }
  return {};
}

Result<DomainOption> parse_domain(xml_node domain, std::string_view run_directory) {
  DomainOption result;
  result.name = domain.child_value("name");
  result.uuid = domain.child_value("uuid");
  auto option = find_option(domain);
  if (!option) return tl::make_unexpected(std::move(option.error()));
  if (!*option) return result;
  if (auto nics = parse_nics(*option, result); !nics) return tl::make_unexpected(std::move(nics.error()));
  if (result.nics.empty()) return result;
  if (result.name.empty()) return wrong("the domain has no <name>");
  if (!is_plain_text(result.name) || !is_plain_text(result.uuid))
    return wrong("the domain's <name> or <uuid> has characters that are no text: " + quoted(result.name));
  for (NicOption& nic : result.nics) {
    nic.socket_path = socket_path(run_directory, nic.mac);
    if (auto fits = fit_interface(domain, nic); !fits) return within("NIC " + nic.mac, std::move(fits.error()));
  }
  if (auto memory = fit_memory(domain); !memory) return tl::make_unexpected(std::move(memory.error()));
  return result;
}

}  // namespace

bool names_tandem(std::string_view domain_xml) noexcept {
  return domain_xml.find(kDomainNamespace) != std::string_view::npos;
}

Result<DomainOption> parse_domain_option(std::string_view domain_xml, std::string_view run_directory) {
  constexpr std::string_view kDoing = "read the domain's Tandem option";
  if (domain_xml.size() > kMaxDomainXml)
    return wrong(std::string{kDoing} + ": the domain XML has " + std::to_string(domain_xml.size()) +
                 " bytes, more than the " + std::to_string(kMaxDomainXml) + " that are read");
  // pugixml knows no entities but XML's own five and never fetches anything; a DOCTYPE is skipped.
  pugi::xml_document document;
  const pugi::xml_parse_result parsed = document.load_buffer(domain_xml.data(), domain_xml.size());
  if (!parsed)
    return wrong(std::string{kDoing} + ": the domain XML cannot be parsed at byte " + std::to_string(parsed.offset) +
                 ": " + parsed.description());
  const xml_node domain = document.child("domain");
  if (!domain) return wrong(std::string{kDoing} + ": the XML's root element is not <domain>");
  auto result = parse_domain(domain, run_directory);
  if (!result) return within(kDoing, std::move(result.error()));
  return result;
}

}  // namespace tandem
