// SPDX-License-Identifier: Apache-2.0
// Answers of tandemd as aligned tables, in virsh's manner.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace tandem {

std::string status_table(const nlohmann::json& status);
std::string incident_table(const nlohmann::json& incidents);

}  // namespace tandem
