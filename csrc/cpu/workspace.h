// Memory that calls leave to later ones: page by page from the system, it takes as long to get as to fill.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace tokenprune {

constexpr int64_t kHeldBytes = 48 << 20;  // of matrices, all threads together; also what is left at most

// Room for `count` numbers, not initialized, at the beginning of a cache line.
template <typename T>
class Workspace {
 public:
  explicit Workspace(int64_t count) : block_(Left::instance().take(count * static_cast<int64_t>(sizeof(T)))) {}
  ~Workspace() { Left::instance().give(std::move(block_)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  T* data() const { return reinterpret_cast<T*>(block_.bytes.get()); }

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct Free {
    void operator()(std::byte* bytes) const { ::operator delete(bytes, kAlignment); }
  };
  struct Block {
    std::unique_ptr<std::byte, Free> bytes;
    int64_t size = 0;
  };

  // The blocks nobody uses, the oldest first.
  class Left {
   public:
    static Left& instance() {
      static Left left;
      return left;
    }

    Block take(int64_t size) {
      {
        const std::lock_guard lock(mutex_);
        for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
          if (block->size != size) continue;
          Block found = std::move(*block);
          blocks_.erase(block);
          bytes_ -= size;
          return found;
        }
      }
      return {std::unique_ptr<std::byte, Free>(static_cast<std::byte*>(::operator new(size, kAlignment))), size};
    }

    void give(Block block) {
      const std::lock_guard lock(mutex_);
      bytes_ += block.size;
      blocks_.push_back(std::move(block));
      while (bytes_ > kHeldBytes) {
        bytes_ -= blocks_.front().size;
        blocks_.erase(blocks_.begin());
      }
    }

   private:
    std::mutex mutex_;
    std::vector<Block> blocks_;
    int64_t bytes_ = 0;
  };

  Block block_;
};

}  // namespace tokenprune
