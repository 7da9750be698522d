#include "serialize/safetensors.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

namespace torchmoe {

namespace {

// In the order in which the safetensors library lays tensors out, the last ones first: sizes fall,
// so that every tensor begins at a multiple of its size.
constexpr std::array<std::pair<std::string_view, at::ScalarType>, 10> safetensors_dtypes = {{
    {"BOOL", at::kBool},
    {"U8", at::kByte},
    {"I8", at::kChar},
    {"I16", at::kShort},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I32", at::kInt},
    {"F32", at::kFloat},
    {"F64", at::kDouble},
    {"I64", at::kLong},
}};

constexpr size_t length_bytes = 8;

// The place of a dtype in the table, its size for one that is not there.
size_t rank_of(at::ScalarType dtype) {
  size_t rank = 0;
  while (rank < safetensors_dtypes.size() && safetensors_dtypes[rank].second != dtype) {
    ++rank;
  }
  return rank;
}

struct Entry {
  std::string name;
  std::optional<at::ScalarType> dtype;
  std::optional<std::vector<int64_t>> shape;
  std::optional<std::vector<int64_t>> data_offsets;

  int64_t begin() const { return (*data_offsets)[0]; }
  int64_t end() const { return (*data_offsets)[1]; }
};

// Reads the header: JSON of exactly this grammar, no other.
class HeaderReader {
 public:
  explicit HeaderReader(std::string_view text) : text_(text) {}

  std::vector<Entry> read() {
    std::vector<Entry> entries;
    TORCH_CHECK_VALUE(text_.starts_with('{'), "its header does not begin with {");
    members([&](std::string name) {
      if (name == "__metadata__") {
        members([this](const std::string&) { string(); });
      } else {
        entries.push_back(entry(std::move(name)));
      }
    });
    skip_space();
    TORCH_CHECK_VALUE(at_ == text_.size(), "its header goes on after the last }");
    return entries;
  }

 private:
  char peek() const {
    TORCH_CHECK_VALUE(at_ < text_.size(), "its header ends early");
    return text_[at_];
  }

  char next() {
    const char c = peek();
    ++at_;
    return c;
  }

  void skip_space() { at_ = std::min(text_.find_first_not_of(" \t\n\r", at_), text_.size()); }

  bool accept(char c) {
    skip_space();
    const bool found = peek() == c;
    at_ += found ? 1 : 0;
    return found;
  }

  void expect(char c) {
    TORCH_CHECK_VALUE(accept(c), "its header has no ", c, " at byte ", length_bytes + at_);
  }

  // Calls `item` for each of the items between two brackets.
  template <typename Item>
  void items(char open, char close, const Item& item) {
    expect(open);
    if (accept(close)) {
      return;
    }
    do {
      item();
    } while (accept(','));
    expect(close);
  }

  // Calls `member` with each key of an object where its value begins.
  template <typename Member>
  void members(const Member& member) {
    items('{', '}', [&] {
      auto key = string();
      expect(':');
      member(std::move(key));
    });
  }

  Entry entry(std::string name) {
    Entry entry;
    const auto set = [&](auto& field, auto value) {
      TORCH_CHECK_VALUE(!field, "its header describes \"", name, "\" twice");
      field = std::move(value);
    };
    members([&](const std::string& key) {
      if (key == "dtype") {
        set(entry.dtype, dtype());
      } else if (key == "shape") {
        set(entry.shape, integers());
      } else if (key == "data_offsets") {
        set(entry.data_offsets, integers());
      } else {
        TORCH_CHECK_VALUE(false, "its header gives \"", name, "\" an unknown field \"", key, "\"");
      }
    });
    TORCH_CHECK_VALUE(entry.dtype && entry.shape && entry.data_offsets,
                      "its header gives \"",
                      name,
                      "\" no dtype, shape or data_offsets");
    TORCH_CHECK_VALUE(entry.data_offsets->size() == 2 && entry.begin() <= entry.end(),
                      "its header gives \"",
                      name,
                      "\" data_offsets that are no range");
    entry.name = std::move(name);
    return entry;
  }

  at::ScalarType dtype() {
    const auto name = string();
    const auto* found = std::find_if(safetensors_dtypes.begin(),
                                     safetensors_dtypes.end(),
                                     [&](const auto& dtype) { return dtype.first == name; });
    TORCH_CHECK_VALUE(
        found != safetensors_dtypes.end(), "it has tensors of the dtype ", name, ", not supported");
    return found->second;
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> values;
    items('[', ']', [&] { values.push_back(integer()); });
    return values;
  }

  // Not negative: 0, or digits without a 0 in front.
  int64_t integer() {
    skip_space();
    const size_t start = at_;
    int64_t value = 0;
    while (peek() >= '0' && peek() <= '9') {
      const int64_t digit = next() - '0';
      TORCH_CHECK_VALUE(value <= (std::numeric_limits<int64_t>::max() - digit) / 10,
                        "its header has a number above 2^63 - 1");
      value = value * 10 + digit;
    }
    TORCH_CHECK_VALUE(at_ > start && (text_[start] != '0' || at_ == start + 1),
                      "its header has no number at byte ",
                      length_bytes + start);
    return value;
  }

  std::string string() {
    expect('"');
    std::string value;
    for (char c = next(); c != '"'; c = next()) {
      TORCH_CHECK_VALUE(static_cast<uint8_t>(c) >= ' ', "its header has a control character");
      if (c == '\\') {
        escape(value);
      } else {
        value += c;
      }
    }
    return value;
  }

  void escape(std::string& value) {
    constexpr std::string_view letters = "\"\\/bfnrt";
    constexpr std::string_view meant = "\"\\/\b\f\n\r\t";
    const char letter = next();
    if (letter == 'u') {
      append_utf8(value, code_point());
      return;
    }
    const auto place = letters.find(letter);
    TORCH_CHECK_VALUE(
        place != std::string_view::npos, "its header has an unknown escape \\", letter);
    value += meant[place];
  }

  // After \u: four digits, and for what lies beyond 16 bits a second escape, of the lower half.
  uint32_t code_point() {
    const uint32_t code = hexadecimal();
    if (code < 0xD800 || code > 0xDFFF) {
      return code;
    }
    TORCH_CHECK_VALUE(code < 0xDC00 && text_.substr(at_, 2) == "\\u",
                      "its header has half a surrogate pair");
    at_ += 2;
    const uint32_t low = hexadecimal();
    TORCH_CHECK_VALUE(low >= 0xDC00 && low <= 0xDFFF, "its header has half a surrogate pair");
    return 0x10000 + ((code - 0xD800) << 10U) + (low - 0xDC00);
  }

  uint32_t hexadecimal() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = next();
      const auto digit = std::string_view("0123456789abcdefABCDEF").find(c);
      TORCH_CHECK_VALUE(digit != std::string_view::npos, "its header has an escape of no number");
      value = value * 16 + static_cast<uint32_t>(digit < 16 ? digit : digit - 6);
    }
    return value;
  }

  static void append_utf8(std::string& text, uint32_t code) {
    const auto tail = [&](unsigned shift) {
      text += static_cast<char>(0x80U | (code >> shift & 0x3FU));
    };
    if (code < 0x80) {
      text += static_cast<char>(code);
    } else if (code < 0x800) {
      text += static_cast<char>(0xC0U | code >> 6U);
      tail(0);
    } else if (code < 0x10000) {
      text += static_cast<char>(0xE0U | code >> 12U);
      tail(6);
      tail(0);
    } else {
      text += static_cast<char>(0xF0U | code >> 18U);
      tail(12);
      tail(6);
      tail(0);
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

// The bytes of the entries follow each other without gaps, whatever order the header has.
void check_ranges(const std::vector<Entry>& entries, uint64_t data_bytes) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const auto& entry : entries) {
    // An empty tensor's other sizes make strides, which must not overflow either.
    auto bytes = static_cast<int64_t>(c10::elementSize(*entry.dtype));
    bool overflow = false;
    bool empty = false;
    for (const int64_t size : *entry.shape) {
      empty |= size == 0;
      overflow |= __builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes);
    }
    TORCH_CHECK_VALUE(!overflow && (empty ? 0 : bytes) == entry.end() - entry.begin(),
                      "its header gives \"",
                      entry.name,
                      "\" a shape and data_offsets of different sizes");
    ranges.emplace_back(entry.begin(), entry.end());
  }
  std::sort(ranges.begin(), ranges.end());
  int64_t covered = 0;
  for (const auto& [begin, end] : ranges) {
    TORCH_CHECK_VALUE(begin == covered, "its tensors overlap or leave a gap");
    covered = end;
  }
  TORCH_CHECK_VALUE(static_cast<uint64_t>(covered) == data_bytes,
                    "its tensors have ",
                    covered,
                    " bytes, the file has ",
                    data_bytes);
}

uint64_t read_length(std::istream& stream) {
  std::array<char, length_bytes> bytes{};
  TORCH_CHECK_VALUE(stream.read(bytes.data(), bytes.size()), "it is shorter than 8 bytes");
  uint64_t length = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    length |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[i])) << (8 * i);
  }
  return length;
}

std::string json_string(std::string_view text) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (const auto code = static_cast<uint8_t>(c); code < ' ') {
      result += "\\u00";
      result += digits[code / 16];
      result += digits[code % 16];
    } else {
      result += c;
    }
  }
  return result + '"';
}

}  // namespace

std::string_view safetensors_dtype(at::ScalarType dtype) {
  const auto rank = rank_of(dtype);
  return rank < safetensors_dtypes.size() ? safetensors_dtypes[rank].first : "";
}

StateDict read_safetensors(std::istream& stream) {
  stream.seekg(0, std::ios::end);
  const auto file_bytes = static_cast<uint64_t>(stream.tellg());
  stream.seekg(0);
  const auto length = read_length(stream);
  const auto left = file_bytes - length_bytes;
  TORCH_CHECK_VALUE(
      length <= left, "its header would have ", length, " bytes where ", left, " are left");
  std::string header(length, ' ');
  TORCH_CHECK_VALUE(stream.read(header.data(), static_cast<std::streamsize>(length)),
                    "its header cannot be read");
  const auto entries = HeaderReader(header).read();
  check_ranges(entries, left - length);
  StateDict state;
  for (const auto& entry : entries) {
    TORCH_CHECK_VALUE(!state.contains(entry.name), "it has \"", entry.name, "\" twice");
    const auto& tensor =
        state.insert(entry.name, at::empty(*entry.shape, at::TensorOptions(*entry.dtype)));
    stream.seekg(static_cast<std::streamoff>(length_bytes + length) + entry.begin());
    stream.read(static_cast<char*>(tensor.mutable_data_ptr()), entry.end() - entry.begin());
    TORCH_CHECK_VALUE(stream, "the bytes of \"", entry.name, "\" cannot be read");
  }
  return state;
}

void write_safetensors(const StateDict& state, std::ostream& stream) {
  std::vector<const StateDict::Item*> order;
  for (const auto& item : state) {
    order.push_back(&item);
  }
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    const auto rank_a = rank_of(a->value().scalar_type());
    const auto rank_b = rank_of(b->value().scalar_type());
    return rank_a != rank_b ? rank_a > rank_b : a->key() < b->key();
  });
  std::string header = R"({"__metadata__":{"format":"pt"})";
  size_t end = 0;
  for (const auto* item : order) {
    const auto& tensor = item->value();
    const auto begin = end;
    end += tensor.nbytes();
    header += c10::str(",", json_string(item->key()), R"(:{"dtype":")");
    header += c10::str(safetensors_dtype(tensor.scalar_type()), R"(","shape":[)");
    header += c10::Join(",", tensor.sizes());
    header += c10::str(R"(],"data_offsets":[)", begin, ",", end, "]}");
  }
  header += '}';
  header.append((length_bytes - header.size() % length_bytes) % length_bytes, ' ');
  for (size_t i = 0; i < length_bytes; ++i) {
    stream.put(static_cast<char>(header.size() >> (8 * i) & 0xFFU));
  }
  stream << header;
  for (const auto* item : order) {
    const auto tensor = item->value().contiguous();
    stream.write(static_cast<const char*>(tensor.const_data_ptr()),
                 static_cast<std::streamsize>(tensor.nbytes()));
  }
}

}  // namespace torchmoe
