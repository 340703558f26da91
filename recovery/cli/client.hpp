// SPDX-License-Identifier: Apache-2.0
// One request to tandemd and its answer (recovery/supervisor/control_server.hpp has the format).
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "common/result.hpp"

namespace tandem {

/// Blocks until tandemd answers or `limit_seconds` pass. An answer with "ok": false becomes an Error with its text.
Result<nlohmann::json> ask_tandemd(const std::string& socket_path, const nlohmann::json& request,
                                   int limit_seconds = 30);

}  // namespace tandem
