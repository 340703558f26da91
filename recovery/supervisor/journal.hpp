// SPDX-License-Identifier: Apache-2.0
// Where tandemd's log goes: with fields to the journal if standard error is the journal's, else as lines to standard
// error.
#pragma once

#include <string>

#include "recovery/supervisor/incident.hpp"

namespace tandem {

/// Whether descriptor `fd` is what `journal_stream` names, "DEVICE:INODE" as systemd sets JOURNAL_STREAM for a service
/// whose output it takes (systemd.exec(5)); nullptr: not started by systemd.
bool is_journal_stream(const char* journal_stream, int fd);

/// Makes spdlog's default logger. `level`: as in the configuration. Once, before the first log line.
void set_up_log(const std::string& level);

/// One line, a warning, when a failover is complete. In the journal it carries MESSAGE_ID, TANDEM_PAIR, TANDEM_SHARD,
/// TANDEM_INCIDENT, TANDEM_CAUSE, TANDEM_VICTIM_PID, TANDEM_HEIR_PID and TANDEM_TAKEOVER_NS (fence's mark to the heir's
/// first poll).
void log_failover(const Incident& incident);

}  // namespace tandem
