#include "../ops/merge_tokens.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>

#include "simd.h"

namespace tokenprune {
namespace {

constexpr int64_t kTile = 256;         // channels summed at a time: their sums stay in the first-level cache
constexpr int64_t kGrain = 32 * 1024;  // values a thread should have to move before another one is worth waking

// Positions come from data, so this is the first place that can see a wrong one.
void check_kept(const MergeTokensParams& params, const int64_t* kept) {
  const int64_t low = params.num_prefix;
  bool good = true;
  for (int64_t b = 0; b < params.batch; ++b, kept += params.keep) {
    for (int64_t k = 0; k < params.keep; ++k) {
      good &= (k == 0 ? low : kept[k - 1] + 1) <= kept[k] && kept[k] < params.tokens;
    }
  }
  STD_TORCH_CHECK(good, "kept must hold ascending positions in ", low, "..", params.tokens - 1, " (patch tokens)");
}

void check_inside(const MergeTokensParams& params, const char* name, const int64_t* positions) {
  bool good = true;
  for (int64_t i = 0; i < params.batch * params.dropped; ++i) good &= 0 <= positions[i] && positions[i] < params.tokens;
  STD_TORCH_CHECK(good, name, " must hold positions in 0..", params.tokens - 1);
}

// The dropped tokens of one image as a list for every token that one is matched with, in ascending order.
struct Lists {
  int32_t* first;  // [tokens]; -1: none
  int32_t* next;   // [dropped]; -1: the last

  void build(const MergeTokensParams& params, const int64_t* match) const {
    std::fill_n(first, params.tokens, -1);
    for (int64_t j = params.dropped - 1; j >= 0; --j) {
      next[j] = first[match[j]];
      first[match[j]] = static_cast<int32_t>(j);
    }
  }
};

// Where the data of one image are.
template <typename scalar_t>
struct Image {
  using acc_t = accumulate_t<scalar_t>;

  const scalar_t* x;       // [tokens, channels]
  const acc_t* size;       // [tokens], or null: ones
  const int64_t* kept;     // [keep]
  const int64_t* dropped;  // [dropped]
  Lists lists;
  scalar_t* merged;     // [tokens_out, channels]
  acc_t* sizes;         // [tokens_out]
  scalar_t* log_sizes;  // [tokens_out]

  acc_t size_of(int64_t token) const { return size ? size[token] : acc_t(1); }
};

template <typename value_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void scale(acc_t weight, const value_t* __restrict__ x, int64_t n, acc_t* __restrict__ sum) {
  for (int64_t c = 0; c < n; ++c) sum[c] = weight * static_cast<acc_t>(x[c]);
}

template <typename scalar_t, typename acc_t>
TOKENPRUNE_MULTIVERSION void divide(const acc_t* __restrict__ sum, acc_t by, int64_t n, scalar_t* __restrict__ out) {
  for (int64_t c = 0; c < n; ++c) out[c] = static_cast<scalar_t>(sum[c] / by);
}

// One kept token with the tokens merged into it: the size-weighted mean goes to `out`, the size of all is returned.
template <typename scalar_t>
accumulate_t<scalar_t> merge(const Image<scalar_t>& image, int64_t token, int64_t channels, scalar_t* out) {
  using acc_t = accumulate_t<scalar_t>;
  const auto* x = reinterpret_cast<const vectorizable_t<scalar_t>*>(image.x);
  const int32_t first = image.lists.first[token];
  acc_t total = image.size_of(token);
  for (int32_t j = first; j >= 0; j = image.lists.next[j]) total += image.size_of(image.dropped[j]);
  acc_t sum[kTile];
  for (int64_t tile = 0; tile < channels; tile += kTile) {
    const int64_t n = std::min(kTile, channels - tile);
    scale(image.size_of(token), x + token * channels + tile, n, sum);
    for (int32_t j = first; j >= 0; j = image.lists.next[j]) {
      const int64_t source = image.dropped[j];
      add_scaled(image.size_of(source), x + source * channels + tile, n, sum);
    }
    divide(sum, total, n, out + tile);
  }
  return total;
}

// The rows first .. last - 1 of one image's result.
template <typename scalar_t>
void fill_rows(const MergeTokensParams& params, const Image<scalar_t>& image, int64_t first, int64_t last) {
  for (int64_t place = first; place < last; ++place) {
    const bool prefix = place < params.num_prefix;
    const int64_t token = prefix ? place : image.kept[place - params.num_prefix];
    scalar_t* out = image.merged + place * params.channels;
    accumulate_t<scalar_t>& total = image.sizes[place];
    if (prefix || image.lists.first[token] < 0) {
      std::copy_n(image.x + token * params.channels, params.channels, out);
      total = image.size_of(token);
    } else {
      total = merge(image, token, params.channels, out);
    }
    image.log_sizes[place] = static_cast<scalar_t>(std::log(total));
  }
}

std::tuple<Tensor, Tensor, Tensor> merge_tokens_cpu(Tensor x, std::optional<Tensor> size, Tensor kept, Tensor dropped,
                                                    Tensor match, int64_t num_prefix) {
  const MergeTokensParams params = check_merge_tokens(x, size, kept, dropped, match, num_prefix);
  x = as_contiguous(x);
  if (size.has_value()) size = as_contiguous(*size);
  kept = as_contiguous(kept);
  dropped = as_contiguous(dropped);
  match = as_contiguous(match);
  const int64_t* keeps = data_ptr<const int64_t>(kept);
  const int64_t* drops = data_ptr<const int64_t>(dropped);
  const int64_t* matches = data_ptr<const int64_t>(match);
  check_kept(params, keeps);
  check_inside(params, "dropped", drops);
  check_inside(params, "match", matches);
  const int64_t links_of_image = params.tokens + params.dropped;
  const std::unique_ptr<int32_t[]> links(new int32_t[params.batch * links_of_image]);
  const auto lists_of = [&](int64_t b) {
    int32_t* first = links.get() + b * links_of_image;
    return Lists{first, first + params.tokens};
  };
  torch::stable::parallel_for(0, params.batch, std::max<int64_t>(1, kGrain / links_of_image),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b)
                                  lists_of(b).build(params, matches + b * params.dropped);
                              });
  Tensor tokens = allocate(x, {params.batch, params.tokens_out(), params.channels}, x.scalar_type());
  Tensor sizes = allocate(x, {params.batch, params.tokens_out()}, accumulate_dtype(x));
  Tensor log_sizes = allocate(x, {params.batch, 1, 1, params.tokens_out()}, x.scalar_type());
  TOKENPRUNE_DISPATCH(x.scalar_type(), "merge_tokens", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const int64_t rows = params.tokens_out();
    // Looked up once: what they are read from is in the cache of this thread.
    const scalar_t* values = data_ptr<const scalar_t>(x);
    const acc_t* given_sizes = size.has_value() ? data_ptr<const acc_t>(*size) : nullptr;
    scalar_t* merged = data_ptr<scalar_t>(tokens);
    acc_t* totals = data_ptr<acc_t>(sizes);
    scalar_t* logs = data_ptr<scalar_t>(log_sizes);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, params.channels));
    torch::stable::parallel_for(0, params.batch * rows, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / rows, before = b * rows;
        const Image<scalar_t> image{values + b * params.tokens * params.channels,
                                    given_sizes ? given_sizes + b * params.tokens : nullptr,
                                    keeps + b * params.keep,
                                    drops + b * params.dropped,
                                    lists_of(b),
                                    merged + before * params.channels,
                                    totals + before,
                                    logs + before};
        const int64_t last = std::min(end, before + rows);
        fill_rows(params, image, begin - before, last - before);
        begin = last;
      }
    });
  });
  return {tokens, sizes, log_sizes};
}

}  // namespace
}  // namespace tokenprune

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("merge_tokens", TORCH_BOX(&tokenprune::merge_tokens_cpu)); }
