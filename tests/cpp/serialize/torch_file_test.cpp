// The bytes of torch.save's files: pickles as Python writes them, and those refused.
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "catch2.h"
#include "serialize/files.h"
#include "serialize/state_dict.h"

#include <caffe2/serialize/inline_container.h>

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::read_state_dict;

namespace {

void write_archive(const std::string& path,
                   const std::vector<std::pair<std::string, std::string>>& records) {
  caffe2::serialize::PyTorchStreamWriter writer(path);
  for (const auto& [name, bytes] : records) {
    writer.writeRecord(name, bytes.data(), bytes.size());
  }
  writer.writeEndOfFile();
}

// Parts of a pickle.
std::string text(const std::string& value) {
  return std::string("\x8c") + static_cast<char>(value.size()) + value;
}

std::string integer(int64_t value) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return "\x8a\x08" + bytes;
}

std::string storage(const std::string& type, const std::string& key, int64_t numel) {
  return "(" + text("storage") + "ctorch\n" + type + "\n" + text(key) + text("cpu") +
         integer(numel) + "tQ";
}

std::string tensor(const std::string& bytes,
                   int64_t offset,
                   const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& strides) {
  auto program = "ctorch._utils\n_rebuild_tensor_v2\n(" + bytes + integer(offset) + "(";
  for (const auto size : sizes) {
    program += integer(size);
  }
  program += "t(";
  for (const auto stride : strides) {
    program += integer(stride);
  }
  return program + "t\x89" + "ccollections\nOrderedDict\n)RtR";
}

std::string global(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}

std::string dict(const std::string& items) {
  return "}(" + items + "u.";
}

const std::string kFour = storage("FloatStorage", "0", 4);

}  // namespace

TEST_CASE("torch files: what Python writes for parameters and modules", "[state]") {
  const Folder folder;
  const std::string zeros(16, '\0');
  const auto ordered = global("collections", "OrderedDict") + ")R";
  const auto two = tensor(kFour, 1, {2}, {2});
  const auto attributes = "}(" + text("note") + "Nu";
  // With frames and memo of protocol 4, attributes of the dict, and all that a value may be wrapped in.
  const auto program = "\x80\x04\x95" + std::string(8, '\0') + ordered + "\x94(" + text("plain") +
                       two + text("parameter") + global("torch._utils", "_rebuild_parameter") +
                       "(" + two + "\x88" + ordered + "tR" + text("noted") + text("torch._utils") +
                       text("_rebuild_parameter_with_state") + "\x93(" + two + "\x88" + ordered +
                       attributes + "tR" + text("buffer") +
                       global("torch._tensor", "_rebuild_from_type_v2") + "(" +
                       global("torch._utils", "_rebuild_tensor_v2") + global("torch", "Tensor") +
                       "(" + kFour + "K\x03))\x89" + ordered + "t" + attributes + "tRu}" +
                       text("_metadata") + "h" + std::string(1, '\0') + "sb.";
  const std::string data("\0\0\0\0\0\0\x80?\0\0\0@\0\0@@", 16);  // 0, 1, 2, 3
  write_archive(folder / "x", {{"data.pkl", program}, {"data/0", data}});
  const auto state = read_state_dict(folder / "x");
  CHECK(state.keys() == std::vector<std::string>{"plain", "parameter", "noted", "buffer"});
  for (const auto* name : {"plain", "parameter", "noted"}) {
    CHECK(torch::equal(state[name], torch::tensor({1.0F, 3.0F})));
  }
  CHECK(torch::equal(state["buffer"], torch::tensor(3.0F)));
}

TEST_CASE("torch files: an int is as Python wrote it", "[state]") {
  const Folder folder;
  const std::string all = tensor(kFour, 0, {4}, {1});
  for (const auto& [offset, problem] : std::vector<std::pair<std::string, std::string>>{
           {"K\x03", ""},
           {std::string("M\x03\0", 3), ""},
           {std::string("J\x03\0\0\0", 5), ""},
           {"\x8a\x01\x03", ""},
           {"\x8a\x01\xff", "sizes and strides do not match"},
           {"J\xff\xff\xff\xff", "sizes and strides do not match"},
           {std::string("M\x00\x01", 3), "leaves its storage"},
           {"\x8a\x09" + std::string(9, '\0'), "an int beyond 64 bits"}}) {
    const auto program = dict(text("a") + global("torch._utils", "_rebuild_tensor_v2") + "(" +
                              kFour + offset + "))\x89NtR");
    write_archive(folder / "x", {{"data.pkl", program}, {"data/0", std::string(16, '\0')}});
    if (problem.empty()) {
      CHECK(read_state_dict(folder / "x")["a"].storage_offset() == 3);
    } else {
      CHECK_THROWS_WITH(read_state_dict(folder / "x"), contains(problem));
    }
  }
}

TEST_CASE("torch files: other pickles are refused with their problem", "[state]") {
  const Folder folder;
  const auto entry = [](const std::string& value) { return dict(text("a") + value); };
  const auto of = [&](int64_t offset, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    return entry(tensor(kFour, offset, sizes, strides));
  };
  const int64_t huge = int64_t{1} << 62;
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "its pickle ends early"},
      {".", "its pickle takes more than it has"},
      {"u", "its pickle takes more than it has"},
      {"h\x05.", "its pickle takes more than it has"},
      {"}", "its pickle ends early"},
      {"X\xff\xff\xff\xff", "its pickle ends early"},
      {"\x8d" + std::string(8, '\xff'), "its pickle ends early"},
      {"ctorch", "its pickle ends early"},
      {"K\x01.", "it holds an int, not a dict of tensors"},
      {"]N\x61.", "it holds a list, not a dict of tensors"},
      {"(.", "it holds a mark, not a dict of tensors"},
      {entry("K\x01"), "\"a\" in it is an int, not a tensor"},
      {entry("G" + std::string(8, '\0')), "\"a\" in it is a float, not a tensor"},
      {entry("}"), "\"a\" in it is a dict, not a tensor"},
      {dict("K\x01" + tensor(kFour, 0, {}, {})), "it has a key that is an int, not a str"},
      {dict(text("a") + tensor(kFour, 0, {}, {}) + text("a") + tensor(kFour, 0, {}, {})),
       "it has \"a\" twice"},
      {dict(text("\xff") + tensor(kFour, 0, {}, {})), "a name in it is not UTF-8"},
      {dict(text("a")), "its pickle has a key without a value"},
      {entry("cos\nsystem\n" + text("true") + "\x85R"),
       "it needs os.system, which is not supported"},
      {entry(text("os") + text("system") + "\x93"), "it needs os.system, which is not supported"},
      {entry("i"), "its pickle has the opcode 105, which is not supported"},
      {entry(storage("HalfStorage", "0", 4)), "its record data/0 has 16 bytes for 4 entries of 2"},
      {entry(storage("FloatStorage", "0", huge)), "has 16 bytes for 4611686018427387904 entries"},
      {entry(storage("FloatStorage", "0", -4)), "has 16 bytes for -4 entries"},
      {entry(storage("FloatStorage", "1", 4)), "its zip has no record data/1"},
      {entry(storage("ComplexFloatStorage", "0", 2)), "it needs torch.ComplexFloatStorage"},
      {entry("(" + text("storage") + global("torch", "Tensor") + "tQ"), "a storage of no dtype"},
      {entry("(" + text("storage") + "tQ"), "its pickle has a tuple that is too short"},
      {entry(text("0") + "Q"), "its pickle has a str where a tuple belongs"},
      {entry(global("torch", "Tensor") + ")R"), "its pickle calls torch.Tensor"},
      {entry(global("torch", "FloatStorage") + ")R"), "its pickle calls torch.FloatStorage"},
      {of(0, {5}, {1}), "leaves its storage"},
      {of(1, {4}, {1}), "leaves its storage"},
      {of(4, {}, {}), "leaves its storage"},
      {of(0, {2, 2}, {1, 3}), "leaves its storage"},
      {of(0, {3}, {huge}), "leaves its storage"},
      {of(huge, {2}, {huge}), "leaves its storage"},
      {of(0, {huge, 4}, {0, 0}), "leaves its storage"},
      {of(std::numeric_limits<int64_t>::max(), {}, {}), "leaves its storage"},
      {of(-1, {1}, {1}), "sizes and strides do not match"},
      {of(0, {1}, {}), "sizes and strides do not match"},
      {of(0, {-1}, {1}), "a tensor of negative sizes or too many"},
      {of(3, {2}, {-1}), "a tensor of negative sizes or too many"},
      {of(0, std::vector<int64_t>(65, 1), std::vector<int64_t>(65, 1)), "sizes or too many"},
      {entry(global("torch._utils", "_rebuild_tensor_v2") + "(" + kFour + "K\x03))\x89N}tR"),
       "its pickle has a tensor with metadata"},
      // Depth costs no stack, and a cycle no memory.
      {std::string(200'000, '(') + ")" + std::string(200'000, 't') + ".", "it holds a tuple"},
      {"}q" + std::string(1, '\0') + text("a") + "h" + std::string(1, '\0') + "s.",
       "\"a\" in it is a dict, not a tensor"},
  };
  for (const auto& [program, problem] : cases) {
    CAPTURE(problem);
    write_archive(folder / "x", {{"data.pkl", program}, {"data/0", std::string(16, '\0')}});
    CHECK_THROWS_AS(read_state_dict(folder / "x"), c10::ValueError);
    CHECK_THROWS_WITH(read_state_dict(folder / "x"), contains(problem));
  }
}

TEST_CASE("torch files: other archives are refused with their problem", "[state]") {
  const Folder folder;
  const auto refused = [&](const std::string& problem) {
    CHECK_THROWS_AS(read_state_dict(folder / "x"), c10::ValueError);
    CHECK_THROWS_WITH(read_state_dict(folder / "x"), contains(problem));
  };
  write_archive(folder / "x", {{"other", ""}});
  refused("its zip has no record data.pkl");
  write_archive(folder / "x", {{"data.pkl", "}."}, {"byteorder", "big"}});
  refused("its bytes are not in little-endian order");
  write_bytes(folder / "x",
              "\x80\x02\x8a\x0al\xfc\x9c"
              "F");
  refused("torch before 1.6 wrote it, which used no zip");
  write_bytes(folder / "x", "PK\x03\x04");
  refused("torch cannot read it: PytorchStreamReader failed reading zip archive");
}
