// Operators of this library called by name, through the dispatcher: FakeTensor, AOTAutograd and
// dispatch modes see the call, and no stage includes another.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

namespace torch_moe_ep {

using MaybeTensor = std::optional<at::Tensor>;

// A string as a template argument.
template <std::size_t kSize>
struct OperatorName {
  // NOLINTNEXTLINE(google-explicit-constructor): so that call_operator<"plan", ...> is all to write
  consteval OperatorName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
  char text[kSize];
};

// What a schema's argument is in C++; the dispatcher wants exactly these types.
template <typename T>
inline constexpr bool kIsOperatorArgument =
    std::is_same_v<T, at::Tensor> || std::is_same_v<T, MaybeTensor> ||
    std::is_same_v<T, std::string> || std::is_same_v<T, int64_t> || std::is_same_v<T, double> ||
    std::is_same_v<T, bool>;

template <typename T>
using PassedArgument = std::conditional_t<std::is_arithmetic_v<T>, T, const T&>;

// call_operator<"combine", Moved>(rows, weights, ...) calls torch_moe_ep::combine with its
// schema's arguments in order. A wrong type raises at the first call.
template <OperatorName kName, typename Result, typename... Arguments>
Result call_operator(const Arguments&... arguments) {
  static_assert((kIsOperatorArgument<Arguments> && ...),
                "Tensor, MaybeTensor, std::string, int64_t, double or bool");
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow((std::string("torch_moe_ep::") + kName.text).c_str(), "")
          .template typed<Result(PassedArgument<Arguments>...)>();
  return op.call(arguments...);
}

}  // namespace torch_moe_ep
