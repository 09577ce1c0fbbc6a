#include "backends/subset/subset_backend.h"

#include <algorithm>

namespace mla {

SubsetBackend::SubsetBackend(std::shared_ptr<Backend> inner, std::set<std::string> ops)
    : inner_(std::move(inner)), ops_(std::move(ops)) {}

bool SubsetBackend::supports_op(const Node& node) const {
  return ops_.contains(std::string(op_name(node.op))) && inner_->supports_op(node);
}

void SubsetBackend::run(std::span<const Step> steps, const Buffer& scratch,
                        const Checkpoint& checkpoint) {
  inner_->run(steps, scratch, checkpoint);
  n_steps_ += std::ranges::count_if(steps, [](const Step& s) { return s.node != nullptr; });
}

}  // namespace mla
