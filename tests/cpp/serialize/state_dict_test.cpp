// What modules and files exchange: names, bits, views, and what is refused.
#include "serialize/state_dict.h"

#include <array>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <string>
#include <vector>

#include "catch2.h"
#include "serialize/files.h"
#include "support.h"

#include <caffe2/serialize/inline_container.h>
#include <sys/resource.h>

using namespace torchmoe::test;  // NOLINT(google-build-using-namespace): the tests' own helpers
using torchmoe::load_state_dict;
using torchmoe::read_state_dict;
using torchmoe::state_dict;
using torchmoe::StateDict;
using torchmoe::write_state_dict;

namespace {

constexpr auto kStateTypes = {torch::kFloat64,
                              torch::kFloat32,
                              torch::kFloat16,
                              torch::kBFloat16,
                              torch::kInt64,
                              torch::kInt32,
                              torch::kInt16,
                              torch::kInt8,
                              torch::kUInt8,
                              torch::kBool};
const std::vector<std::string> kFileNames = {"state.pt", "state.safetensors"};

bool same(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         torch::equal(torch::nan_to_num(a), torch::nan_to_num(b));
}

class Leaf : public torch::nn::Module {
 public:
  Leaf() {
    buffer = register_buffer("a_buffer", torch::arange(3));
    weight = register_parameter("weight", wave({2, 3}, 0, 1, torch::kFloat32));
    register_parameter("absent", Tensor(), /*requires_grad=*/false);
  }
  Tensor buffer;
  Tensor weight;
};

class Tree : public torch::nn::Module {
 public:
  Tree() {
    leaf = register_module("leaf", std::make_shared<Leaf>());
    scale = register_parameter("scale", torch::ones({}));
  }
  std::shared_ptr<Leaf> leaf;
  Tensor scale;
};

}  // namespace

TEST_CASE("state_dict has Python's names in Python's order, and the module's memory", "[state]") {
  Tree tree;
  const auto state = state_dict(tree);
  CHECK(state.keys() == std::vector<std::string>{"scale", "leaf.weight", "leaf.a_buffer"});
  CHECK(state["leaf.weight"].data_ptr() == tree.leaf->weight.data_ptr());
  CHECK_FALSE(state["leaf.weight"].requires_grad());
}

TEST_CASE("load_state_dict copies in place, to the module's dtype", "[state]") {
  Tree tree;
  const auto* before = tree.leaf->weight.data_ptr();
  StateDict state;
  state.insert("leaf.a_buffer", torch::arange(3, 6));
  state.insert("leaf.weight", strided(wave({2, 3}, 2)));
  state.insert("scale", torch::tensor(7, torch::kInt));
  load_state_dict(tree, state);
  CHECK(tree.leaf->weight.data_ptr() == before);
  CHECK(tree.leaf->weight.requires_grad());
  CHECK(tree.leaf->weight.is_leaf());
  CHECK(torch::equal(tree.leaf->weight, wave({2, 3}, 2).to(torch::kFloat32)));
  CHECK(torch::equal(tree.leaf->buffer, torch::arange(3, 6)));
  CHECK(tree.scale.item<float>() == 7);
}

TEST_CASE("load_state_dict names every difference and then writes nothing", "[state]") {
  Tree tree;
  StateDict state;
  state.insert("scale", torch::zeros({}));
  state.insert("leaf.weight", torch::zeros({3, 2}));
  state.insert("leaf.other", torch::zeros({}));
  state.insert("last", torch::zeros({}));
  CHECK_THROWS_AS(load_state_dict(tree, state), c10::ValueError);
  CHECK_THROWS_WITH(
      load_state_dict(tree, state),
      contains("load_state_dict: state must have the names and shapes of the module, got "
               "\"leaf.weight\" of shape [3, 2] for [2, 3], "
               "no \"leaf.a_buffer\", unexpected \"leaf.other\", unexpected \"last\""));
  CHECK(tree.scale.item<float>() == 1);

  auto filled = state_dict(tree);
  for (const auto& wrong : {Tensor(), torch::eye(3).to_sparse(), torch::ones({2, 3}, at::kMeta)}) {
    filled["leaf.weight"] = wrong;
    CHECK_THROWS_WITH(load_state_dict(tree, filled), contains("\"leaf.weight\" as a"));
  }
}

TEST_CASE("files keep the bits of every dtype and shape", "[state]") {
  const Folder folder;
  StateDict state;
  for (const auto dtype : kStateTypes) {
    for (const at::IntArrayRef sizes :
         std::vector<std::vector<int64_t>>{{}, {0}, {1}, {2, 0, 3}, {3, 5}}) {
      state.insert(c10::str(dtype, sizes), (wave(sizes) * 100).to(dtype));
    }
  }
  state.insert("", torch::tensor({NAN, INFINITY, -0.0F}));
  state.insert("na\u00efve \"q\\uote\"\n\t\x01 \u65e5\U0001f600", torch::ones({2}));
  for (const auto& name : kFileNames) {
    CAPTURE(name);
    write_state_dict(state, folder / name);
    std::filesystem::rename(folder / name, folder / "any.bin");
    const auto found = read_state_dict(folder / "any.bin");
    CHECK(found.size() == state.size());
    for (const auto& item : state) {
      CAPTURE(item.key());
      REQUIRE(found.contains(item.key()));
      CHECK(same(found[item.key()], item.value()));
    }
    write_state_dict(StateDict(), folder / name);
    CHECK(read_state_dict(folder / name).is_empty());
  }
}

TEST_CASE("files hold views and shared memory", "[state]") {
  const Folder folder;
  const auto base = wave({6, 8});
  StateDict state;
  state.insert("base", base.clone().requires_grad_());
  state.insert("transposed", base.t());
  state.insert("slice", base.slice(0, 1, 5).slice(1, 2, 7, 2));
  state.insert("expanded", base.slice(0, 2, 3).expand({4, 8}));
  state.insert("past the end", base.slice(0, 6).slice(1, 3));
  state.insert("other dtype", base.view(torch::kInt64));
  const auto bytes = torch::arange(9, torch::kUInt8);
  state.insert("of bytes", bytes.slice(0, 0, 8).view(torch::kFloat32));
  state.insert("negated", torch::_neg_view(base));
  for (const auto& name : kFileNames) {
    CAPTURE(name);
    write_state_dict(state, folder / name);
    const auto found = read_state_dict(folder / name);
    for (const auto& item : state) {
      CAPTURE(item.key());
      CHECK(same(found[item.key()], item.value()));
      CHECK_FALSE(found[item.key()].requires_grad());
    }
  }
  const auto found = read_state_dict(folder / "state.pt");
  CHECK(found.keys() == state.keys());
  CHECK(found["slice"].strides() == state["slice"].strides());
  CHECK(found["slice"].storage_offset() == state["slice"].storage_offset());
  CHECK(found["slice"].is_alias_of(found["transposed"]));
  CHECK_FALSE(found["slice"].is_alias_of(found["other dtype"]));
}

TEST_CASE("a module's file loads into another module", "[state]") {
  const Folder folder;
  Tree one;
  torch::nn::init::uniform_(one.leaf->weight);
  for (const auto& name : kFileNames) {
    Tree other;
    write_state_dict(state_dict(one), folder / name);
    load_state_dict(other, read_state_dict(folder / name));
    CHECK(torch::equal(one.leaf->weight, other.leaf->weight));
  }
}

TEST_CASE("write_state_dict refuses what files do not hold", "[state]") {
  const Folder folder;
  for (const auto& name : kFileNames) {
    for (const auto& wrong : {Tensor(),
                              torch::eye(3).to_sparse(),
                              torch::ones({2}, at::kMeta),
                              torch::ones({2}, torch::kComplexFloat),
                              torch::ones({2}).to(torch::kFloat8_e4m3fn)}) {
      StateDict state;
      state.insert("a", wrong);
      CHECK_THROWS_AS(write_state_dict(state, folder / name), c10::ValueError);
      CHECK_THROWS_WITH(write_state_dict(state, folder / name),
                        contains("write_state_dict: state must hold dense tensors of floats, ints "
                                 "or bools, got \"a\", a"));
    }
    for (const auto* bad :
         {"\xff", "\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80"}) {
      StateDict state;
      state.insert(bad, torch::ones({2}));
      CHECK_THROWS_WITH(write_state_dict(state, folder / name),
                        contains("write_state_dict: state must have names in UTF-8, got"));
    }
  }
  StateDict state;
  state.insert("__metadata__", torch::ones({2}));
  CHECK_THROWS_WITH(write_state_dict(state, folder / "x.safetensors"),
                    contains("state must not use a name of the format's own, got"));
  CHECK(folder.size() == 0);
  write_state_dict(state, folder / "x.pt");
  CHECK(read_state_dict(folder / "x.pt").contains("__metadata__"));
}

TEST_CASE("a file that cannot be written leaves what was there", "[state]") {
  const Folder folder;
  StateDict state;
  state.insert("a", torch::ones({1000}));
  std::filesystem::create_directory(folder / "state");
  CHECK_THROWS_WITH(write_state_dict(state, folder / "state"),
                    contains("write_state_dict: path must be that of a file, got"));
  CHECK_THROWS_WITH(write_state_dict(state, folder / "none/state"),
                    contains("write_state_dict: path must be in a writable folder, got"));
  CHECK(folder.size() == 1);

  for (const auto& name : kFileNames) {
    write_bytes(folder / name, "before");
    // As on a full disk.
    rlimit limit{};
    getrlimit(RLIMIT_FSIZE, &limit);
    const rlimit small{100, limit.rlim_max};
    auto* const handler = std::signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    CHECK_THROWS_WITH(write_state_dict(state, folder / name),
                      contains("write_state_dict: path must have room for the file, got"));
    setrlimit(RLIMIT_FSIZE, &limit);
    std::signal(SIGXFSZ, handler);
    CHECK(read_bytes(folder / name) == "before");
  }
  CHECK(folder.size() == 3);
}

TEST_CASE("read_state_dict refuses what is no file", "[state]") {
  const Folder folder;
  for (const auto& path : {folder / "none", folder / "."}) {
    CHECK_THROWS_AS(read_state_dict(path), c10::ValueError);
    CHECK_THROWS_WITH(
        read_state_dict(path),
        contains("read_state_dict: path must be a readable file, got \"" + path + "\""));
  }
}

TEST_CASE("damaged files are read or refused, never more", "[state]") {
  const Folder folder;
  StateDict state;
  state.insert("a", wave({2, 3}).t());
  state.insert("b", torch::ones({3}, torch::kBool));
  const auto attempt = [&](const std::string& bytes) {
    write_bytes(folder / "damaged", bytes);
    try {
      for (const auto& item : read_state_dict(folder / "damaged")) {
        item.value().to(torch::kFloat64).sum();
      }
      return true;
    } catch (const c10::ValueError& e) {
      CHECK(e.msg().starts_with("read_state_dict: path must be an intact file"));
      return false;
    }
  };
  for (const auto& name : kFileNames) {
    CAPTURE(name);
    write_state_dict(state, folder / name);
    const auto whole = read_bytes(folder / name);
    CHECK(attempt(whole));
    for (size_t i = 0; i < whole.size(); ++i) {
      CAPTURE(i);
      CHECK_FALSE(attempt(whole.substr(0, i)));
      auto bytes = whole;
      bytes[i] = static_cast<char>(bytes[i] ^ std::array{1, 8, 128, 255}[i % 4]);
      attempt(bytes);
    }
  }
}
