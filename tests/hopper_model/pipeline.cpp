// Runs the pipeline of one Hopper GEMM kernel, of a drawn problem, under a drawn schedule.
//
//     pipeline CONFIG SEED
//
// Prints what went wrong, or how many parts of tiles were stored.
#include <cstring>

#include "expert_mlp/sm90/kernel.cuh"

namespace torch_moe_ep::sm90 {
uint8_t dynamic_shared[1 << 18];
}

namespace {

using namespace torch_moe_ep;
using namespace torch_moe_ep::sm90;

constexpr auto NT = GemmLayout::kNT, NN = GemmLayout::kNN, TN = GemmLayout::kTN;

template <class Config>
int run(unsigned seed) {
  device::random_source.seed(seed);
  constexpr bool kIsTn = Config::kLayout == TN;
  std::vector<int64_t> offsets = {0};
  const int num_experts = 1 + device::draw(4);
  for (int i = 0; i < num_experts; ++i) {
    offsets.push_back(offsets.back() + kRowAlignment * device::draw(kIsTn ? 4 : 6));
  }
  const int k = 8 + 8 * device::draw(90), columns = 8 + 8 * device::draw(120);
  int next_tile = 0;
  KernelArguments args = {};
  args.a = {'A',
            Config::kTransposeA ? kStepK / Config::kClusterN : Config::kBlockM / Config::kClusterN};
  args.b = {'B',
            Config::kTransposeB ? kStepK / Config::kClusterM : Config::kBlockN / Config::kClusterM};
  args.space.segments.offsets = offsets.data();
  args.space.num_experts = num_experts;
  const int super_m = Config::kBlockM * Config::kClusterM,
            super_n = Config::kBlockN * Config::kClusterN;
  args.space.fixed_tiles_m = kIsTn ? (k + super_m - 1) / super_m : 0;
  args.space.tiles_n = (columns + super_n - 1) / super_n;
  args.space.group_m = 8;
  args.next_tile = &next_tile;
  args.k_steps = kIsTn ? 0 : (k + kStepK - 1) / kStepK;
  args.out_rows = kIsTn ? k : 0;
  args.columns = columns;
  args.alpha = 1.0f;
  // SwiGLU's gradient: 64 rows x 32 columns of z at a time, in place of which the result is stored.
  args.z = {'Z', 32};
  args.out = {'O', 32};
  args.rows = offsets.back();
  std::vector<float> row_weights(args.rows + 64),
      dots(args.rows * args.space.tiles_n * Config::kClusterN + 64);
  args.row_weights = row_weights.data();
  args.partial_dots = dots.data();
  on_store = [&](int column, int half, int row) {
    if (half > 0 || device::group_of_current().log.empty()) return;
    check_products<Config>({'A', row, 0, expert_of_row(args.space, row)}, column, args.k_steps);
  };
  device::cluster_size = Config::kClusterSize;
  device::num_ctas = (1 + device::draw(2)) * Config::kClusterSize;
  for (int group = 0; group < device::num_ctas * 3; ++group) {
    if (group % 3 != 0)
      device::engines.push_back([group] { return device::of<device::Group>(group).execute_one(); });
  }
  device::run([&] { grouped_gemm_kernel<Config>(args); });
  // Each part of a tile that lies in the result was stored once.
  int wanted = 0;
  for (int expert = 0; expert < num_experts; ++expert) {
    const int begin = static_cast<int>(offsets[expert]),
              rows = kIsTn ? k : static_cast<int>(offsets[expert + 1]) - begin;
    for (int row = 0; row < rows; row += Config::kGroupRows) {
      for (int column = 0; column < columns; column += Config::kBlockN) {
        ++wanted;
        const int found = num_stored[{expert, row + (kIsTn ? 0 : begin), column}];
        if (found != 1) device::fail("stores of a part", found, row, column);
      }
    }
  }
  if (wanted != static_cast<int>(num_stored.size()))
    device::fail("parts", wanted, num_stored.size());
  std::printf("%d\n", wanted);
  std::fflush(stdout);
  std::_Exit(0);
}

struct Named {
  const char* name;
  int (*run)(unsigned);
};

// Layout, block M, block N, ping-pong, cluster M, cluster N, stages, store buffers, batch, B kept.
constexpr Named kConfigs[] = {
    {"single", run<KernelConfig<NT, 128, 256, false, 1, 1, 3, 4, 2>>},
    {"wide", run<KernelConfig<NN, 128, 256, false, 2, 1, 3, 4, 2>>},
    {"large", run<KernelConfig<NT, 256, 192, false, 1, 2, 3, 3, 1>>},
    {"tall", run<KernelConfig<NN, 256, 128, false, 1, 2, 4, 1, 1>>},
    {"ping_pong", run<KernelConfig<NT, 128, 192, true, 2, 1, 5, 1, 1>>},
    {"ping_pong_single", run<KernelConfig<NT, 128, 192, true, 1, 1, 4, 2, 1>>},
    {"swiglu", run<KernelConfig<NT, 128, 192, true, 2, 1, 4, 2, 1, false, GemmEpilogue::kSwiglu>>},
    {"swiglu_gradient",
     run<KernelConfig<NN, 128, 192, true, 2, 1, 4, 2, 1, false, GemmEpilogue::kSwigluBackward>>},
    {"weight_gradient", run<KernelConfig<TN, 128, 192, true, 2, 1, 4, 3, 3>>},
    {"wide_weight_gradient", run<KernelConfig<TN, 128, 256, false, 2, 1, 3, 4, 2>>},
    {"few_rows", run<KernelConfig<TN, 128, 192, true, 1, 2, 4, 3, 3, true>>},
};

}  // namespace

int main(int, char** argv) {
  for (const Named& config : kConfigs) {
    if (std::strcmp(config.name, argv[1]) == 0) return config.run(std::atoi(argv[2]));
  }
  return 2;
}
