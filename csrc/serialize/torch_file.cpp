#include "serialize/torch_file.h"

#include <cstddef>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/core/Dict.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>
#include <c10/core/Storage.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/serialization/pickler.h>

#include "serialize/unpickle.h"

#include <caffe2/serialize/inline_container.h>

namespace torchmoe {

namespace {

// The zip's records. They are not compressed: all that is read of them is no longer than the file,
// however its directory has been tampered with.
class Archive {
 public:
  explicit Archive(std::istream& stream) : reader_(&stream) {
    stream.seekg(0, std::ios::end);
    left_ = static_cast<size_t>(stream.tellg());
  }

  bool has(const std::string& name) { return reader_.hasRecord(name); }

  std::tuple<at::DataPtr, size_t> record(const std::string& name) {
    TORCH_CHECK_VALUE(has(name), "its zip has no record ", name);
    const auto size = reader_.getRecordSize(name);
    TORCH_CHECK_VALUE(size <= left_, "its zip has records longer than the file");
    left_ -= size;
    return reader_.getRecord(name);
  }

  std::string text(const std::string& name) {
    const auto [data, size] = record(name);
    return {static_cast<const char*>(data.get()), size};
  }

 private:
  caffe2::serialize::PyTorchStreamReader reader_;
  size_t left_ = 0;
};

// A storage has one dtype in a file. A tensor that sees one as another dtype, or sees one that is
// no whole number of its entries, is written with a storage of its own.
StateDict with_storages_of_one_dtype(const StateDict& state) {
  std::unordered_map<const void*, at::ScalarType> dtypes;
  StateDict result;
  for (const auto& item : state) {
    const auto& tensor = item.value();
    const auto& storage = tensor.storage();
    const auto dtype = dtypes.emplace(storage.unsafeGetStorageImpl(), tensor.scalar_type()).first;
    const bool fits =
        dtype->second == tensor.scalar_type() && storage.nbytes() % tensor.element_size() == 0;
    result.insert(item.key(), fits ? tensor : tensor.clone());
  }
  return result;
}

}  // namespace

StateDict read_torch_file(std::istream& stream) {
  Archive archive(stream);
  TORCH_CHECK_VALUE(!archive.has("byteorder") || archive.text("byteorder") == "little",
                    "its bytes are not in little-endian order");
  std::map<std::string, at::Storage, std::less<>> storages;
  const auto storage = [&](std::string_view key) {
    auto found = storages.find(key);
    if (found == storages.end()) {
      auto [data, size] = archive.record("data/" + std::string(key));
      at::Storage bytes(at::Storage::use_byte_size_t(), size, std::move(data));
      found = storages.emplace(key, std::move(bytes)).first;
    }
    return found->second;
  };
  return unpickle_state_dict(archive.text("data.pkl"), storage);
}

void write_torch_file(const StateDict& state, std::ostream& stream) {
  c10::impl::GenericDict dict(c10::StringType::get(), c10::TensorType::get());
  const auto written = with_storages_of_one_dtype(state);
  for (const auto& item : written) {
    dict.insert(item.key(), item.value());
  }
  std::string program;
  torch::jit::Pickler pickler([&](const char* data, size_t size) { program.append(data, size); },
                              /*tensor_table=*/nullptr,
                              /*type_renamer=*/nullptr,
                              /*memoized_class_types=*/nullptr,
                              /*get_tensor_id=*/nullptr,
                              /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(dict);
  pickler.stop();
  // The writer must not see a failure: it would throw again in its destructor. The stream keeps it.
  caffe2::serialize::PyTorchStreamWriter writer([&](const void* data, size_t size) {
    stream.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
    return size;
  });
  writer.writeRecord("data.pkl", program.data(), program.size());
  const std::string_view order = "little";
  writer.writeRecord("byteorder", order.data(), order.size());
  size_t place = 0;
  for (const auto& tensor : pickler.tensorData()) {
    const auto& storage = tensor.storage();
    writer.writeRecord("data/" + std::to_string(place), storage.data(), storage.nbytes());
    ++place;
  }
  writer.writeEndOfFile();
}

}  // namespace torchmoe
