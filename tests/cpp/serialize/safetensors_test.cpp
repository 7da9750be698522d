// The bytes of safetensors files: those written, and those refused.
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "catch2.h"
#include "serialize/files.h"
#include "serialize/state_dict.h"

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::read_state_dict;
using torchmoe::StateDict;
using torchmoe::write_state_dict;

namespace {

std::string safetensors(const std::string& header, const std::string& data = "") {
  std::string length(8, '\0');
  const uint64_t size = header.size();
  std::memcpy(length.data(), &size, sizeof size);
  return length + header + data;
}

}  // namespace

TEST_CASE("safetensors are laid out as the format asks", "[state]") {
  const Folder folder;
  StateDict state;
  state.insert("b", torch::ones({1}, torch::kBool));
  state.insert("z", torch::ones({1}));
  state.insert("a", torch::ones({1}));
  write_state_dict(state, folder / "x.safetensors");
  auto header = std::string(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
      R"("z":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},)"
      R"("b":{"dtype":"BOOL","shape":[1],"data_offsets":[8,9]}})");
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::string one("\0\0\x80?", 4);
  CHECK(read_bytes(folder / "x.safetensors") == safetensors(header, one + one + "\x01"));

  // Any JSON of that meaning; a header of 0x4b50 bytes begins as a zip does.
  header =
      " \n{ \"\\u65e5\\uD83D\\ude00\\n\\/\" :{\"shape\":[ 0 ,2 ],\"data_offsets\":[0,0],"
      "\"dtype\":\"I8\"}\t}";
  header.erase(0, 2);
  header.resize(0x4b50, ' ');
  write_bytes(folder / "x", safetensors(header));
  CHECK(read_state_dict(folder / "x").keys() == std::vector<std::string>{"\u65e5\U0001f600\n/"});
}

TEST_CASE("bad safetensors are refused with their problem", "[state]") {
  const Folder folder;
  const auto entry =
      [](const std::string& name, const std::string& shape, const std::string& range) {
        return "\"" + name + R"(":{"dtype":"U8","shape":)" + shape + R"(,"data_offsets":)" + range +
               "}";
      };
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "it is shorter than 8 bytes"},
      {std::string(8, '\xff'), "its header would have 18446744073709551615 bytes where 0 are left"},
      {safetensors(""), "its header does not begin with {"},
      {safetensors("{"), "its header ends early"},
      {safetensors("{}}"), "its header goes on after the last }"},
      {safetensors("{\"a\"}"), "its header has no : at byte 12"},
      {safetensors("{\"a\":{}}"), "gives \"a\" no dtype, shape or data_offsets"},
      {safetensors("{\"__metadata__\":{\"a\":1}}"), "its header has no \" at byte"},
      {safetensors("{\"a\":{\"dtype\":\"F8\"}}"), "it has tensors of the dtype F8, not supported"},
      {safetensors("{\"a\":{\"b\":1}}"), "gives \"a\" an unknown field \"b\""},
      {safetensors("{\"a\":{\"shape\":[],\"shape\":[]}}"), "describes \"a\" twice"},
      {safetensors("{\"a\":{\"shape\":[-1]}}"), "its header has no number at byte 23"},
      {safetensors("{\"a\":{\"shape\":[01]}}"), "its header has no number at byte 23"},
      {safetensors("{\"a\":{\"shape\":[9223372036854775808]}}"), "a number above 2^63 - 1"},
      {safetensors("{\"\\x\":{}}"), "its header has an unknown escape \\x"},
      {safetensors("{\"\\u12g4\":{}}"), "its header has an escape of no number"},
      {safetensors("{\"\\ud83d\":{}}"), "its header has half a surrogate pair"},
      {safetensors("{\"\\ude00\":{}}"), "its header has half a surrogate pair"},
      {safetensors("{\"\n\":{}}"), "its header has a control character"},
      {safetensors("{" + entry("\xc0\x80", "[0]", "[0,0]") + "}"), "a name in it is not UTF-8"},
      {safetensors("{" + entry("a", "[1]", "[0]") + "}"), "data_offsets that are no range"},
      {safetensors("{" + entry("a", "[1]", "[1,0]") + "}"), "data_offsets that are no range"},
      {safetensors("{" + entry("a", "[2]", "[0,1]") + "}", "x"), "of different sizes"},
      {safetensors("{" + entry("a", "[4294967296,4294967296]", "[0,0]") + "}"),
       "of different sizes"},
      {safetensors("{" + entry("a", "[0,4294967296,4294967296]", "[0,0]") + "}"), "of different"},
      {safetensors("{" + entry("a", "[1]", "[0,1]") + "}"),
       "its tensors have 1 bytes, the file has 0"},
      {safetensors("{" + entry("a", "[1]", "[0,1]") + "}", "xy"), "have 1 bytes, the file has 2"},
      {safetensors("{" + entry("a", "[1]", "[1,2]") + "}", "xy"), "overlap or leave a gap"},
      {safetensors("{" + entry("a", "[1]", "[0,1]") + "," + entry("b", "[1]", "[0,1]") + "}", "x"),
       "overlap or leave a gap"},
      {safetensors("{" + entry("a", "[0]", "[0,0]") + "," + entry("a", "[0]", "[0,0]") + "}"),
       "it has \"a\" twice"},
  };
  for (const auto& [bytes, problem] : cases) {
    CAPTURE(bytes);
    write_bytes(folder / "x", bytes);
    CHECK_THROWS_AS(read_state_dict(folder / "x"), c10::ValueError);
    CHECK_THROWS_WITH(read_state_dict(folder / "x"), contains(problem));
  }
}
