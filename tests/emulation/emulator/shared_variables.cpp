#include "shared_variables.h"

#include <cstring>
#include <utility>
#include <vector>

#include "fresh_memory.h"

namespace emulation {
namespace {

using Variables = std::vector<std::pair<Site, FreshMemory>>;
std::vector<Variables> variables_of_blocks;

}  // namespace

void reset_shared_variables(int blocks) {
  variables_of_blocks.clear();
  variables_of_blocks.resize(static_cast<size_t>(blocks));
}

void* find_shared_variable(Site declaration, size_t bytes) {
  Variables& variables = variables_of_blocks[static_cast<size_t>(current_block())];
  for (const auto& [site, memory] : variables) {
    if (site == declaration) return memory.data();
  }
  const race::Unseen unseen;
  FreshMemory memory(bytes);
  std::memset(memory.data(), 0xff, bytes);
  return variables.emplace_back(declaration, std::move(memory)).second.data();
}

}  // namespace emulation
