#include "nn/detail/checks.h"

#include <array>
#include <charconv>
#include <cmath>
#include <sstream>

#include <ATen/ops/isfinite.h>
#include <c10/util/Type.h>

#include "common/checks.h"
#include "ops/limit_capacity.h"

namespace torchmoe::nn {

std::string shown(double number) {
  if (!std::isfinite(number)) {
    return std::isnan(number) ? "nan" : number > 0 ? "inf" : "-inf";
  }
  const double size = std::abs(number);
  const bool is_plain = size == 0 || (size >= 1e-4 && size < 1e16);
  const auto format = is_plain ? std::chars_format::fixed : std::chars_format::scientific;
  std::array<char, 32> digits{};  // the fewest that tell it from every other number
  const auto end = std::to_chars(digits.begin(), digits.end(), number, format).ptr;
  const std::string text(digits.begin(), end);
  return is_plain && text.find('.') == std::string::npos ? text + ".0" : text;
}

std::string class_name(const std::type_info& type) {
  std::string name = c10::demangle(type.name());
  name = name.substr(0, name.find('<'));
  if (const auto last = name.rfind("::"); last != std::string::npos) {
    name = name.substr(last + 2);
  }
  const std::string suffix = "Impl";
  return name.ends_with(suffix) ? name.substr(0, name.size() - suffix.size()) : name;
}

void check_backup_table(std::string_view owner, const std::vector<int64_t>& backup) {
  TORCH_CHECK_VALUE(backup.size() >= 2,
                    owner,
                    ": backup must have an entry for each of two or more experts, got ",
                    listed(backup));
  check_backup(owner, backup);
}

void check_output(std::string_view part,
                  const at::Tensor& output,
                  at::IntArrayRef shape,
                  std::string_view layout,
                  const at::Device& device) {
  TORCH_CHECK_TYPE(output.defined(),
                   "MoE: ",
                   part,
                   " must return ",
                   shape.empty() ? "" : "a tensor ",
                   layout,
                   shape.empty() ? " as a tensor" : "",
                   ", got None");
  if (output.sizes() != shape) {
    std::ostringstream sizes;
    sizes << layout;
    if (!shape.empty()) {
      sizes << " = " << shape;
    }
    TORCH_CHECK(false, "MoE: ", part, " must return ", sizes.str(), ", got shape ", output.sizes());
  }
  TORCH_CHECK(output.is_floating_point(),
              "MoE: ",
              part,
              " must return floating numbers, got ",
              output.scalar_type());
  TORCH_CHECK(output.device() == device,
              "MoE: ",
              part,
              " must return a tensor on ",
              device,
              ", got one on ",
              output.device());
}

void check_counts(std::string_view owner,
                  std::string_view argument,
                  const at::Tensor& counts,
                  int64_t num_experts,
                  const at::Device& device,
                  bool whole) {
  check_defined(owner, argument, counts);
  const bool is_counting = at::isIntegralType(counts.scalar_type(), /*includeBool=*/false) ||
                           (!whole && counts.is_floating_point());
  TORCH_CHECK(is_counting && counts.sizes() == at::IntArrayRef(num_experts),
              owner,
              ": ",
              argument,
              " must be ",
              whole ? "integers" : "numbers",
              " [num_experts] = [",
              num_experts,
              "], got ",
              counts.scalar_type(),
              " of shape ",
              counts.sizes());
  TORCH_CHECK(counts.device() == device,
              owner,
              ": ",
              argument,
              " must be on ",
              device,
              ", got ",
              counts.device());
  if (counts.is_cpu()) {
    const auto wrong = counts.ge(0).logical_and_(at::isfinite(counts)).logical_not_();
    TORCH_CHECK_VALUE(!wrong.any().item<bool>(),
                      owner,
                      ": ",
                      argument,
                      " must be finite and >= 0, got ",
                      counts.masked_select(wrong)[0].item());
  }
}

void check_token_mask(const at::Tensor& token_mask, const at::Tensor& x) {
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK(token_mask.scalar_type() == at::kBool && token_mask.sizes() == leading,
              "MoE: token_mask must be bool of shape ",
              leading,
              ", got ",
              token_mask.scalar_type(),
              " of shape ",
              token_mask.sizes());
  TORCH_CHECK(token_mask.device() == x.device(),
              "MoE: token_mask must be on ",
              x.device(),
              ", got ",
              token_mask.device());
}

std::string listed(const std::vector<int64_t>& entries) {
  std::ostringstream text;
  const char* separator = "";
  text << '(';
  for (const auto entry : entries) {
    text << separator << entry;
    separator = ", ";
  }
  text << (entries.size() == 1 ? ",)" : ")");
  return text.str();
}

}  // namespace torchmoe::nn
