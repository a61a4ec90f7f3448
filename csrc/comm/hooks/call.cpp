#include "comm/hooks/call.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <c10/util/hash.h>

#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace torch_moe_ep::comm {
namespace {

constexpr char kBetweenFields = '\t';
constexpr int kNumFields = 9;

std::string joined(const std::vector<int64_t>& values) { return c10::Join(",", values); }

std::vector<int64_t> numbers(const std::string& text) {
  std::vector<int64_t> values;
  std::istringstream stream(text);
  std::string word;
  while (std::getline(stream, word, ',')) values.push_back(std::stoll(word));
  return values;
}

}  // namespace

uint64_t Call::fingerprint() const {
  const std::string_view stage = label.stage != nullptr ? label.stage : "";
  return c10::get_hash(std::string_view(operation),
                       static_cast<int>(dtype.value_or(at::ScalarType::Undefined)),
                       layer_hash(label.layer),
                       stage);
}

std::string ReadCall::describe() const {
  std::ostringstream text;
  text << "#" << number << " (" << operation;
  if (!dtype.empty()) {
    text << " of " << dtype << ", " << sent_bytes << " bytes sent, " << received_bytes
         << " received";
  }
  if (!layer.empty()) text << "; layer " << layer;
  if (!stage.empty()) text << (layer.empty() ? "; stage " : ", stage ") << stage;
  text << ")";
  return text.str();
}

std::string to_line(const Call& call) {
  std::ostringstream line;
  line << call.number << kBetweenFields << call.operation << kBetweenFields
       << (call.dtype ? c10::toString(*call.dtype) : "") << kBetweenFields
       << layer_name(call.label.layer) << kBetweenFields
       << (call.label.stage != nullptr ? call.label.stage : "") << kBetweenFields << call.sent_bytes
       << kBetweenFields << call.received_bytes << kBetweenFields << joined(call.sent_to)
       << kBetweenFields << joined(call.received_from);
  return line.str();
}

ReadCall from_line(const std::string& line) {
  std::vector<std::string> fields(1);
  for (const char letter : line) {
    if (letter == kBetweenFields) {
      fields.emplace_back();
    } else {
      fields.back() += letter;
    }
  }
  TORCH_CHECK(fields.size() == kNumFields, "not a call of this version of torch_moe_ep: ", line);
  return {std::stoull(fields[0]),
          fields[1],
          fields[2],
          fields[3],
          fields[4],
          std::stoll(fields[5]),
          std::stoll(fields[6]),
          numbers(fields[7]),
          numbers(fields[8])};
}

}  // namespace torch_moe_ep::comm
