#include "checkpoint.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <unistd.h>

#include <torch/optim/serialize.h>
#include <torch/serialize/archive.h>

#include "errors.h"
#include "text.h"

namespace {

constexpr std::string_view kTitle = "torchmoe C++ example, checkpoint 1, ";

/// The first line of the file before this content.
std::string header(const std::string& content) {
  char hash[17];
  std::snprintf(hash, sizeof hash, "%016llx", static_cast<unsigned long long>(hash_of(content)));
  return std::string(kTitle) + hash + "\n";
}

/// A key of the archive, which takes no dashes.
std::string key(const Option& option) {
  std::string name = "setting" + std::string(option.name);
  for (char& letter : name) {
    letter = letter == '-' ? '_' : letter;
  }
  return name;
}

int64_t read_int(torch::serialize::InputArchive& archive, const std::string& name) {
  c10::IValue value;
  archive.read(name, value);
  return value.toInt();
}

/// Writes the file and waits until the disk has it.
void write_file(const std::filesystem::path& path, const std::string& content) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  bool done = file >= 0;
  for (size_t start = 0; done && start < content.size();) {
    const auto written = write(file, content.data() + start, content.size() - start);
    done = written > 0;
    start += done ? static_cast<size_t>(written) : 0;
  }
  done = done && fsync(file) == 0;
  const int reason = errno;
  if (file >= 0) {
    close(file);
  }
  if (!done) {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
    throw SystemError("cannot write " + path.string() + ": " + std::strerror(reason));
  }
}

}  // namespace

Checkpoint::Checkpoint(const Settings& settings, int64_t text_hash)
    : settings_(settings),
      text_hash_(text_hash),
      path_(std::filesystem::path(settings.out) / "checkpoint") {}

void Checkpoint::save(const ByteLM& model,
                      const torch::optim::AdamW& optimizer,
                      const Progress& progress) const {
  torch::serialize::OutputArchive archive, weights, state;
  model->save(weights);
  archive.write("model", weights);
  optimizer.save(state);
  archive.write("optimizer", state);
  archive.write("step", c10::IValue(progress.step));
  archive.write("bits", c10::IValue(progress.bits));
  archive.write("count", c10::IValue(progress.count));
  archive.write("text", c10::IValue(text_hash_));
  for (const auto& option : options()) {
    if (option.settled) {
      archive.write(key(option), c10::IValue(settings_.*option.value));
    }
  }
  std::ostringstream stream;
  archive.save_to(stream);
  const auto content = stream.str();

  try {
    std::filesystem::create_directories(path_.parent_path());
    const auto unfinished = path_.string() + ".new";
    write_file(unfinished, header(content) + content);
    std::filesystem::rename(unfinished, path_);
  } catch (const std::filesystem::filesystem_error& error) {
    throw SystemError("cannot write " + path_.string() + ": " + error.code().message());
  }
}

bool Checkpoint::load(ByteLM& model, torch::optim::AdamW& optimizer, Progress& progress) const {
  std::error_code unknown;
  if (!std::filesystem::exists(path_, unknown) && !unknown) {
    return false;
  }
  std::ifstream file(path_, std::ios::binary);
  if (!file.is_open()) {
    throw SystemError("cannot read " + path_.string() + ": " + std::strerror(errno));
  }
  std::string first_line;
  std::getline(file, first_line);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  if (first_line + "\n" != header(content)) {
    throw InputError("the checkpoint must be a whole one of this program, got " + path_.string() +
                     ", which is damaged or not one; move it away to start anew");
  }
  torch::serialize::InputArchive archive, weights, state;
  archive.load_from(content.data(), content.size());
  for (const auto& option : options()) {
    const int64_t given = settings_.*option.value;
    const int64_t saved = option.settled ? read_int(archive, key(option)) : given;
    if (given != saved) {
      throw InputError(std::string(option.name) + " must stay " + std::to_string(saved) +
                       ", with which " + path_.string() + " was made, got " +
                       std::to_string(given) + "; another --out starts anew");
    }
  }
  if (read_int(archive, "text") != text_hash_) {
    throw InputError("the text must be the one with which " + path_.string() +
                     " was made, got another; another --out starts anew");
  }
  archive.read("model", weights);
  model->load(weights);
  archive.read("optimizer", state);
  optimizer.load(state);
  c10::IValue bits;
  archive.read("bits", bits);
  progress = {read_int(archive, "step"), bits.toDouble(), read_int(archive, "count")};
  return true;
}
