// SPDX-License-Identifier: Apache-2.0
// The domain-XML option: good domains, and every mistake an operator can make, each with the remedy in the text.
#include "vmm/domain_option.hpp"

#include <catch2/catch.hpp>

using namespace tandem;
using namespace std::chrono_literals;

namespace {

constexpr std::string_view kDomain = R"(<domain type='kvm' id='7'>
  <name>web</name>
  <uuid>6c7dc2a6-5f0b-4d8c-a9d6-4c4fb0d1b7c1</uuid>
  <metadata>
    <other:thing xmlns:other="urn:other" with="attributes">text</other:thing>
    <tandem:domain xmlns:tandem="urn:tandem:domain:1">
      <tandem:nic mac="52:54:00:AB:34:56" pair="default">
        <tandem:uplink bridge="br0"/>
        <tandem:watchdog spin="5ms" blocked="7ms"/>
      </tandem:nic>
    </tandem:domain>
  </metadata>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <cpu mode='host-model'></cpu>
  <devices>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>
    <interface type='vhostuser'>
      <mac address='52:54:00:ab:34:56'/>
      <source type='unix' path='/run/tandem/nic/52-54-00-ab-34-56.sock' mode='client'>
        <reconnect enabled='yes' timeout='1'/>
      </source>
      <model type='virtio'/>
      <driver queues='2'/>
    </interface>
  </devices>
</domain>)";

std::string changed(std::string_view from, std::string_view to) {
  std::string xml{kDomain};
  const std::size_t at = xml.find(from);
  REQUIRE(at != std::string::npos);
  xml.replace(at, from.size(), to);
  return xml;
}

}  // namespace

TEST_CASE("a domain with one Tandem NIC") {
  const auto option = parse_domain_option(kDomain);
  INFO((option ? std::string{} : option.error().text));
  REQUIRE(option.has_value());
  CHECK(names_tandem(kDomain));
  CHECK(option->name == "web");
  CHECK(option->uuid == "6c7dc2a6-5f0b-4d8c-a9d6-4c4fb0d1b7c1");
  REQUIRE(option->nics.size() == 1);
  const NicOption& nic = option->nics[0];
  CHECK(nic.mac == "52:54:00:ab:34:56");
  CHECK(nic.pair == "default");
  CHECK(nic.uplink.kind == UplinkOption::Kind::kBridge);
  CHECK(nic.uplink.name == "br0");
  CHECK(nic.watchdog.spin == 5ms);
  CHECK(nic.watchdog.blocked == 7ms);
  CHECK(nic.queues == 2);
  CHECK(nic.socket_path == "/run/tandem/nic/52-54-00-ab-34-56.sock");
}

TEST_CASE("variants that are right") {
  struct Row {
    const char* from;
    const char* to;
  };
  const Row row = GENERATE(values<Row>({
      {"<tandem:watchdog spin=\"5ms\" blocked=\"7ms\"/>", ""},
      {"spin=\"5ms\"", "spin=\"1000us\""},
      {"spin=\"5ms\"", "spin=\"10s\""},
      {" pair=\"default\"", ""},
      {"bridge=\"br0\"", "dev=\"enp3s0f1.100\""},
      {"bridge=\"br0\"", "bridge=\"br0\" direct=\"no\""},
      {"bridge=\"br0\"", "bridge=\"br0\" direct=\"yes\""},
      {"bridge=\"br0\"", "null=\"sink\""},
      {"bridge=\"br0\"", "null=\"source\""},
      {"bridge=\"br0\"", "null=\"source\" frame=\"1518\""},
      {"bridge=\"br0\"", "null=\"loopback\""},
      {"bridge=\"br0\"", "bridge=\"exactly15letter\""},
      {"<driver queues='2'/>", ""},
      {"<driver queues='2'/>", "<driver name='vhost' queues='32'/>"},
      {"<driver queues='2'/>", "<driver queues='2' packed='on'/>"},
      {"<source type='memfd'/>", "<source type='file'/>"},
      {"<source type='memfd'/>", "<hugepages/>"},
      {"<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n  <cpu mode='host-model'>",
       "<cpu><numa><cell id='0' memAccess='shared'/><cell id='1' memAccess='shared'/></numa>"},
      {"<cpu mode='host-model'>", "<cpu><numa><cell id='0'/><cell id='1' memAccess='shared'/></numa>"},
      {"<tandem:uplink", "<!-- a comment --><tandem:uplink"},
      {"<domain type", "<?xml version='1.0'?><!DOCTYPE domain [<!ENTITY a 'b'>]><domain type"},
  }));
  INFO(row.from << " -> " << row.to);
  const auto option = parse_domain_option(changed(row.from, row.to));
  INFO((option ? std::string{} : option.error().text));
  REQUIRE(option.has_value());
  CHECK(option->nics.size() == 1);
}

TEST_CASE("the namespace counts, not the prefix") {
  std::string xml{kDomain};
  for (std::size_t at = xml.find("tandem:"); at != std::string::npos; at = xml.find("tandem:", at + 1)) {
    if (xml.compare(at - 1, 1, "<") == 0 || xml.compare(at - 1, 1, "/") == 0) xml.replace(at, 7, "t:");
  }
  xml.replace(xml.find("xmlns:tandem"), 12, "xmlns:t");
  const auto option = parse_domain_option(xml);
  INFO((option ? std::string{} : option.error().text));
  REQUIRE(option.has_value());
  CHECK(option->nics.size() == 1);
}

TEST_CASE("domains without a Tandem NIC are left alone, whatever else is in them") {
  for (const char* xml :
       {"<domain/>", "<domain><name>x</name><metadata/></domain>",
        "<domain><metadata><a:domain xmlns:a='urn:other'><a:nic wrong='1'/></a:domain></metadata></domain>",
        "<domain><!-- urn:tandem:domain:1 --><name>x</name></domain>",
        "<domain><metadata><t:domain xmlns:t='urn:tandem:domain:1'/></metadata></domain>"}) {
    const auto option = parse_domain_option(xml);
    REQUIRE(option.has_value());
    CHECK(option->nics.empty());
  }
  CHECK_FALSE(names_tandem("<domain><name>tandem</name></domain>"));
}

TEST_CASE("the run directory is the caller's") {
  const auto option = parse_domain_option(changed("/run/tandem/nic", "/tmp/t/nic"), "/tmp/t");
  REQUIRE(option.has_value());
  CHECK(option->nics[0].socket_path == "/tmp/t/nic/52-54-00-ab-34-56.sock");
  CHECK_FALSE(parse_domain_option(kDomain, "/tmp/t").has_value());
}

TEST_CASE("two NICs") {
  std::string xml =
      changed("</tandem:domain>",
              "<tandem:nic mac='52:54:00:ab:34:57'><tandem:uplink dev='eth1'/></tandem:nic></tandem:domain>");
  const std::string second =
      "<interface type='vhostuser'><mac address='52:54:00:ab:34:57'/>"
      "<source type='unix' path='/run/tandem/nic/52-54-00-ab-34-57.sock' mode='client'><reconnect "
      "enabled='yes'/></source>"
      "<model type='virtio'/></interface></devices>";
  xml.replace(xml.find("</devices>"), 10, second);
  const auto option = parse_domain_option(xml);
  INFO((option ? std::string{} : option.error().text));
  REQUIRE(option.has_value());
  REQUIRE(option->nics.size() == 2);
  CHECK(option->nics[1].uplink.kind == UplinkOption::Kind::kDevice);
  CHECK(option->nics[1].queues == 1);
  CHECK(option->nics[1].watchdog.spin == kDefaultHangLimit);
}

TEST_CASE("mistakes are refused with the remedy") {
  struct Row {
    const char* from;
    const char* to;
    const char* says;
  };
  const Row row = GENERATE(values<Row>({
      // our own elements
      {"<tandem:domain xmlns", "<tandem:other xmlns", "parsed"},
      {"</tandem:domain>", "</tandem:domain><x:domain xmlns:x='urn:tandem:domain:1'/>", "keep one"},
      {"</tandem:domain>", "</tandem:domain><x:status xmlns:x='urn:tandem:domain:1'/>", "unknown element"},
      {"<tandem:nic", "<tandem:card/><tandem:nic", "unknown element <tandem:card>"},
      {"<tandem:nic", "<nic/><tandem:nic", "unknown element <nic>"},
      {"<tandem:nic", "text<tandem:nic", "unexpected text"},
      {"urn:tandem:domain:1\">", "urn:tandem:domain:1\" version='2'>", "unknown attribute 'version'"},
      {"pair=\"default\"", "pear=\"default\"", "unknown attribute 'pear'"},
      {"pair=\"default\"", "pair=\"../x\"", "not a pair name"},
      {"pair=\"default\"", "pair=\"\"", "not a pair name"},
      {"<tandem:uplink", "<tandem:mirror/><tandem:uplink", "unknown element"},
      {"mac=\"52:54:00:AB:34:56\"", "", "no mac attribute"},
      {"52:54:00:AB:34:56", "52:54:00:AB:34", "six bytes"},
      {"52:54:00:AB:34:56", "52-54-00-AB-34-56", "six bytes"},
      {"52:54:00:AB:34:56", "52:54:00:AB:34:5g", "six bytes"},
      {"52:54:00:AB:34:56", "53:54:00:AB:34:56", "six bytes"},
      {"52:54:00:AB:34:56", "00:00:00:00:00:00", "six bytes"},
      {"</tandem:domain>",
       "<tandem:nic mac='52:54:00:ab:34:56'><tandem:uplink null='sink'/></tandem:nic></tandem:domain>", "named twice"},
      // uplink
      {"<tandem:uplink bridge=\"br0\"/>", "", "0 <uplink> elements"},
      {"<tandem:uplink bridge=\"br0\"/>", "<tandem:uplink dev='a'/><tandem:uplink dev='b'/>", "2 <uplink> elements"},
      {"bridge=\"br0\"", "", "0 of the attributes"},
      {"bridge=\"br0\"", "bridge=\"br0\" dev=\"eth0\"", "2 of the attributes"},
      {"bridge=\"br0\"", "bridge=\"sixteencharacter\"", "not a network interface name"},
      {"bridge=\"br0\"", "bridge=\"\"", "not a network interface name"},
      {"bridge=\"br0\"", "bridge=\"br/0\"", "not a network interface name"},
      {"bridge=\"br0\"", "bridge=\"br 0\"", "not a network interface name"},
      {"bridge=\"br0\"", "bridge=\"..\"", "not a network interface name"},
      {"bridge=\"br0\"", "bridge=\"br0;reboot\"", "not a network interface name"},
      {"bridge=\"br0\"", "null=\"yes\"", "null='sink', 'source' or 'loopback'"},
      {"bridge=\"br0\"", "null=\"\"", "null='sink', 'source' or 'loopback'"},
      {"bridge=\"br0\"", "null=\"sink\" bridge=\"br0\"", "2 of the attributes"},
      {"bridge=\"br0\"", "null=\"source\" frame=\"59\"", "from 60 to 1522"},
      {"bridge=\"br0\"", "null=\"source\" frame=\"1523\"", "from 60 to 1522"},
      {"bridge=\"br0\"", "null=\"source\" frame=\"64B\"", "from 60 to 1522"},
      {"bridge=\"br0\"", "null=\"source\" frame=\"\"", "from 60 to 1522"},
      {"bridge=\"br0\"", "null=\"sink\" frame=\"64\"", "goes with null='source' only"},
      {"bridge=\"br0\"", "bridge=\"br0\" direct=\"maybe\"", "write 'yes' or 'no'"},
      {"bridge=\"br0\"", "dev=\"eth0\" direct=\"no\"", "goes with bridge= only"},
      {"bridge=\"br0\"", "bridge=\"br0\" frame=\"64\"", "goes with null='source' only"},
      {"bridge=\"br0\"", "vlan=\"3\" bridge=\"br0\"", "unknown attribute 'vlan'"},
      {"<tandem:uplink bridge=\"br0\"/>", "<tandem:uplink bridge=\"br0\"><tandem:x/></tandem:uplink>",
       "unknown element"},
      // watchdog
      {"spin=\"5ms\"", "spin=\"5\"", "with a unit"},
      {"spin=\"5ms\"", "spin=\"ms\"", "with a unit"},
      {"spin=\"5ms\"", "spin=\"-5ms\"", "with a unit"},
      {"spin=\"5ms\"", "spin=\"5.5ms\"", "with a unit"},
      {"spin=\"5ms\"", "spin=\"5 ms\"", "with a unit"},
      {"spin=\"5ms\"", "spin=\"5m\"", "with a unit"},
      {"spin=\"5ms\"", "spin=\"999us\"", "1ms to 10s"},
      {"spin=\"5ms\"", "spin=\"0s\"", "1ms to 10s"},
      {"spin=\"5ms\"", "spin=\"11s\"", "1ms to 10s"},
      {"spin=\"5ms\"", "spin=\"18446744073709551615s\"", "1ms to 10s"},
      {"spin=\"5ms\"", "spin=\"18446744073709551616s\"", "1ms to 10s"},
      {"spin=\"5ms\"", "spin=\"\"", "watchdog spin=''"},
      {"spin=\"5ms\"", "spin=\"0\"", "with a unit"},
      {"spin=\"5ms\"", "spin=\"ms5\"", "with a unit"},
      {"spin=\"5ms\"", "spin=\"5MS\"", "with a unit"},
      {"spin=\"5ms\"", "spin=\"10001ms\"", "1ms to 10s"},
      {"blocked=\"7ms\"", "blocked=\"0ms\"", "watchdog blocked="},
      {"blocked=\"7ms\"", "blocked=\"-1ms\"", "watchdog blocked="},
      {"blocked=\"7ms\"", "blocked=\"7\"", "watchdog blocked="},
      {"blocked=\"7ms\"", "blocked=\"99999999999999999999s\"", "watchdog blocked="},
      {"spin=\"5ms\"", "sleep=\"5ms\"", "unknown attribute 'sleep'"},
      {"<tandem:watchdog", "<tandem:watchdog/><tandem:watchdog", "more than one <watchdog>"},
      // the rest of the domain
      {"<name>web</name>", "", "no <name>"},
      {"<mac address='52:54:00:ab:34:56'/>", "<mac address='52:54:00:ab:34:58'/>", "no <interface> has this MAC"},
      {"<mac address='52:54:00:00:00:01'/>", "<mac address='52:54:00:ab:34:56'/>", "more than one <interface>"},
      {"<interface type='vhostuser'>", "<interface type='bridge'>", "type='vhostuser'"},
      {"<model type='virtio'/>", "", "<model type='virtio'/>"},
      {"<model type='virtio'/>", "<model type='e1000'/>", "<model type='virtio'/>"},
      {"/run/tandem/nic/52-54-00-ab", "/run/tandem/nic/52-54-00-AB", "path='/run/tandem/nic/52-54-00-ab-34-56.sock'"},
      {"path='/run/tandem/nic/52-54-00-ab-34-56.sock'", "", "path='/run/tandem/nic/52-54-00-ab-34-56.sock'"},
      {"mode='client'", "mode='server'", "mode='client'"},
      {"<reconnect enabled='yes' timeout='1'/>", "", "<reconnect enabled='yes' timeout='1'/>"},
      {"enabled='yes'", "enabled='no'", "<reconnect enabled='yes' timeout='1'/>"},
      {"queues='2'", "queues='33'", "1 to 32"},
      {"queues='2'", "queues='0'", "1 to 32"},
      {"queues='2'", "queues='2x'", "1 to 32"},
      {"<access mode='shared'/>", "", "memory is not shared"},
      {"<access mode='shared'/>", "<access mode='private'/>", "memory is not shared"},
      {"<source type='memfd'/>", "<source type='anonymous'/>", "memory is not shared"},
      {"<cpu mode='host-model'>", "<cpu><numa><cell id='0'/><cell id='1' memAccess='private'/></numa>", "memAccess"},
      // XML
      {"</metadata>", "", "cannot be parsed"},
      {"<domain type='kvm' id='7'>", "<domain", "cannot be parsed"},
  }));
  INFO(row.from << " -> " << row.to);
  const auto option = parse_domain_option(changed(row.from, row.to));
  REQUIRE_FALSE(option.has_value());
  INFO(option.error().text);
  CHECK(option.error().kind == ErrorKind::kInvalid);
  CHECK(option.error().text.find(row.says) != std::string::npos);
}

// They go into JSON, logs and tables; a surrogate once ended tandemd, whose JSON library throws at it.
TEST_CASE("names that are no text are refused") {
  for (const char* name : {"&#xD800;", "&#xDFFF;", "a&#27;[2J", "a\nb", "\x7f", "\xff", "\xc0\xaf", "\xe0\x80\xaf",
                           "\xf5\x80\x80\x80", "\xf4\x90\x80\x80", "\xc3", "\xe2\x82"}) {
    INFO(name);
    const auto option = parse_domain_option(changed("<name>web</name>", std::string("<name>w") + name + "</name>"));
    REQUIRE_FALSE(option.has_value());
    CHECK(option.error().text.find("no text") != std::string::npos);
  }
  for (const char* name : {"\xc3\xa4", "\xe2\x82\xac", "\xf0\x9f\x90\xa2", "\xf4\x8f\xbf\xbf", "&amp;"})
    CHECK(parse_domain_option(changed("<name>web</name>", std::string("<name>w") + name + "</name>")).has_value());
  CHECK_FALSE(parse_domain_option(changed("<uuid>6c", "<uuid>\xff")).has_value());
}

TEST_CASE("hostile XML is harmless") {
  CHECK_FALSE(parse_domain_option("").has_value());
  CHECK_FALSE(parse_domain_option("<a/>").has_value());
  CHECK_FALSE(parse_domain_option(std::string(5u << 20, ' ')).has_value());
  CHECK_FALSE(parse_domain_option(std::string_view{"\0<domain/>", 10}).has_value());
  // A million levels deep: neither parsing nor freeing may recurse.
  std::string deep = "<domain><metadata>";
  for (int i = 0; i < 1'000'000; ++i) deep += "<a>";
  CHECK_FALSE(parse_domain_option(deep).has_value());
  // Entities stay what they are.
  const auto option = parse_domain_option(
      "<!DOCTYPE domain [<!ENTITY a SYSTEM 'file:///etc/passwd'><!ENTITY b "
      "'&a;&a;'>]><domain><name>&b;</name></domain>");
  REQUIRE(option.has_value());
  CHECK(option->name == "&b;");
}
