/* Checks every pass of dcn_cuda.h against plain loops, to the last bit, without Python or torch.
 *
 *     selftest [configurations] [first seed]     exit status 1 and a line for each difference
 *     selftest large                             index arithmetic beyond 2^31: some 40 GB of memory
 *                                                that is reserved and hardly touched
 *
 * nvcc builds it for a GPU, where compute-sanitizer can watch it; a C++ compiler with the emulation's
 * headers builds it for the CPU, where ASan and UBSan can (tests/cuda). Data are small integers, offsets
 * and masks eighths: every sum is exact in float32, in any order. Arrays are allocated to the byte.
 */
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "../../csrc/cuda/dcn_cuda.h"

#if defined(DCN_EMULATED)
extern "C" void dcn_emulation_schedule(int order, uint64_t seed);
#else
static void dcn_emulation_schedule(int, uint64_t) {}
#endif

namespace {

typedef std::vector<double> Values;
const double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
int failures = 0;
std::string configuration;

void check(int error, const char *what) {
  if (!error) return;
  printf("FAILED %s: %s (%s)\n", what, dcn_cuda_error(error), configuration.c_str());
  exit(2); /* after an error on a device nothing that follows means anything */
}

/* A number generator whose numbers are the same everywhere. */
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 11;
  }
  int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(int percent) { return below(100) < percent; }
};

int64_t size_of(int dtype) { return dtype == DCN_FLOAT64 ? 8 : dtype == DCN_FLOAT32 ? 4 : 2; }
int arithmetic(int dtype) { return dtype == DCN_FLOAT64 ? DCN_FLOAT64 : DCN_FLOAT32; }

void encode(int dtype, double value, char *to) {
  const float f = (float)value;
  const __half h = __float2half_rn(f);
  const __nv_bfloat16 b = __float2bfloat16_rn(f);
  switch (dtype) {
    case DCN_FLOAT32:
      memcpy(to, &f, 4);
      break;
    case DCN_FLOAT64:
      memcpy(to, &value, 8);
      break;
    case DCN_FLOAT16:
      memcpy(to, &h, 2);
      break;
    default:
      memcpy(to, &b, 2);
  }
}

double decode(int dtype, const char *from) {
  float f;
  double d;
  __half h;
  __nv_bfloat16 b;
  switch (dtype) {
    case DCN_FLOAT32:
      memcpy(&f, from, 4);
      return f;
    case DCN_FLOAT64:
      memcpy(&d, from, 8);
      return d;
    case DCN_FLOAT16:
      memcpy(&h, from, 2);
      return __half2float(h);
    default:
      memcpy(&b, from, 2);
      return __bfloat162float(b);
  }
}

double rounded(int dtype, double value) {
  char memory[8];
  encode(dtype, value, memory);
  return decode(dtype, memory);
}

/* Device memory, exactly as large as its contents. */
struct Memory {
  char *address = nullptr;
  size_t bytes;
  explicit Memory(size_t bytes) : bytes(bytes) {
    check(cudaMalloc((void **)&address, bytes ? bytes : 1), "cudaMalloc");
    check(cudaMemset(address, 0xFF, bytes), "cudaMemset"); /* NaN */
  }
  Memory(const void *from, size_t bytes) : Memory(bytes) {
    check(cudaMemcpy(address, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Memory(int dtype, const Values &values) : Memory(values.size() * size_of(dtype)) {
    std::vector<char> host(bytes);
    for (size_t i = 0; i < values.size(); i++)
      encode(dtype, values[i], host.data() + i * size_of(dtype));
    check(cudaMemcpy(address, host.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  ~Memory() { cudaFree(address); }

  std::vector<char> host() const {
    std::vector<char> copy(bytes);
    check(cudaMemcpy(copy.data(), address, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return copy;
  }
  Values values(int dtype) const {
    const std::vector<char> copy = host();
    Values result(bytes / size_of(dtype));
    for (size_t i = 0; i < result.size(); i++)
      result[i] = decode(dtype, copy.data() + i * size_of(dtype));
    return result;
  }
};

bool same(double a, double b) { return a == b || (a != a && b != b); }

void compare(const char *what, int dtype, const Values &expected, const Values &got) {
  for (size_t i = 0; i < expected.size(); i++) {
    const double want = rounded(dtype, expected[i]);
    if (same(want, got[i])) continue;
    printf("FAILED %s[%zu]: expected %g, got %g (%s)\n", what, i, want, got[i],
           configuration.c_str());
    failures++;
    return;
  }
}

/* One call: its params and its data, as if everything were NCHW and contiguous. */
struct Call {
  dcn_params p;
  Values input, offset, mask, bias, grad_output;
  bool has_mask;

  int64_t taps() const { return p.kernel_h * p.kernel_w; }
  int64_t plane() const { return p.out_h * p.out_w; }
  int64_t pixels() const { return p.batch * plane(); }
};

Call random_call(Random &r, int dtype, bool rows) {
  Call call;
  dcn_params &p = call.p;
  memset(&p, 0, sizeof(p));
  p.dtype = dtype;
  p.layout = rows || r.chance(40) ? DCN_NHWC : DCN_NCHW;
  p.groups = r.between(1, 3);
  p.offset_groups = r.between(1, 3);
  p.in_channels = p.groups * p.offset_groups * r.between(1, rows ? 3 : 12);
  if (rows) p.in_channels *= 16 / size_of(dtype);
  p.out_channels = p.groups * r.between(1, 3);
  p.batch = r.between(1, 3);
  p.kernel_h = r.between(1, 4), p.kernel_w = r.between(1, 4);
  p.stride_h = r.between(1, 3), p.stride_w = r.between(1, 3);
  p.dilation_h = r.between(1, 3), p.dilation_w = r.between(1, 3);
  p.pad_top = r.between(0, 3), p.pad_left = r.between(0, 3);
  p.out_h = r.between(1, 9), p.out_w = r.chance(20) ? r.between(17, 40) : r.between(1, 12);
  p.in_h = std::max<int64_t>(1, (p.out_h - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1 -
                                    p.pad_top - r.between(0, 3));
  p.in_w = std::max<int64_t>(1, (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1 -
                                    p.pad_left - r.between(0, 3));
  auto fill = [&](Values &values, int64_t count, auto value) {
    values.resize(count);
    for (double &v : values) v = value();
  };
  const int64_t G = p.offset_groups, K = call.taps();
  fill(call.input, p.batch * p.in_channels * p.in_h * p.in_w, [&] { return r.between(-4, 4); });
  fill(call.mask, p.batch * G * K * call.plane(), [&] { return r.between(0, 8) / 8.0; });
  fill(call.bias, p.out_channels, [&] { return r.between(-8, 8); });
  fill(call.grad_output, call.pixels() * p.out_channels, [&] { return r.between(-4, 4); });
  fill(call.offset, p.batch * 2 * G * K * call.plane(), [&]() -> double {
    const double infinity = std::numeric_limits<double>::infinity();
    switch (r.below(24)) {
      case 0:
        return NOT_A_NUMBER;
      case 1:
        return r.chance(50) ? infinity : -infinity;
      case 2:
        return r.chance(50) ? 8192 : -8192;
      case 3:
        return r.chance(50) ? 1e30 : -1e30;
      case 4:
      case 5:
      case 6:
        return r.between(-3, 3);
      default:
        return r.between(-24, 24) / 8.0;
    }
  });
  /* Some exactly at -1 and at the far border. */
  for (int64_t i = 0; i < (int64_t)call.offset.size(); i++) {
    if (!r.chance(10)) continue;
    const int64_t pixel = i % call.plane(), channel = i / call.plane();
    const int64_t tap = channel / 2 % K;
    const bool y = channel % 2 == 0;
    const int64_t base =
        y ? pixel / p.out_w * p.stride_h - p.pad_top + tap / p.kernel_w * p.dilation_h
          : pixel % p.out_w * p.stride_w - p.pad_left + tap % p.kernel_w * p.dilation_w;
    call.offset[i] = (r.chance(60) ? -1 : y ? p.in_h : p.in_w) - base;
  }
  call.has_mask = r.chance(70);
  if (!call.has_mask) std::fill(call.mask.begin(), call.mask.end(), 1.0);
  return call;
}

/* Index in a contiguous tensor of `channels` planes of h * w pixels, in that layout. */
int64_t place(int layout, int64_t channels, int64_t h_w, int64_t n, int64_t c, int64_t pixel) {
  return layout == DCN_NHWC ? (n * h_w + pixel) * channels + c : (n * channels + c) * h_w + pixel;
}

Values in_layout(const Values &nchw, int layout, int64_t channels, int64_t h_w) {
  Values result(nchw.size());
  for (int64_t i = 0; i < (int64_t)nchw.size(); i++) {
    const int64_t pixel = i % h_w, c = i / h_w % channels, n = i / h_w / channels;
    result[place(layout, channels, h_w, n, c, pixel)] = nchw[i];
  }
  return result;
}

/* Where a tap samples, by the papers' formula: hats over the pixels of its cell. */
struct Hat {
  bool nan, value, slopes;
  int64_t y, x;
  double ly, lx;
};

Hat hat(const Call &call, int64_t n, int64_t g, int64_t tap, int64_t pixel) {
  const dcn_params &p = call.p;
  const int64_t channel = (n * p.offset_groups + g) * call.taps() + tap;
  const double dy = rounded(p.dtype, call.offset[2 * channel * call.plane() + pixel]);
  const double dx = rounded(p.dtype, call.offset[(2 * channel + 1) * call.plane() + pixel]);
  const double py =
      (double)(pixel / p.out_w * p.stride_h - p.pad_top + tap / p.kernel_w * p.dilation_h) + dy;
  const double px =
      (double)(pixel % p.out_w * p.stride_w - p.pad_left + tap % p.kernel_w * p.dilation_w) + dx;
  Hat h = {};
  h.nan = py != py || px != px;
  if (h.nan || py < -1 || px < -1 || py >= (double)p.in_h || px >= (double)p.in_w) return h;
  h.slopes = true;
  h.value = py > -1 && px > -1;
  h.y = (int64_t)std::floor(py), h.x = (int64_t)std::floor(px);
  h.ly = py - (double)h.y, h.lx = px - (double)h.x;
  return h;
}

double pixel_value(const Call &call, int64_t n, int64_t c, int64_t y, int64_t x) {
  const dcn_params &p = call.p;
  if (y < 0 || x < 0 || y >= p.in_h || x >= p.in_w) return 0;
  return call.input[((n * p.in_channels + c) * p.in_h + y) * p.in_w + x];
}

/* Index of a column, or of a grad_column (one piece). */
int64_t column(const Call &call, const dcn_cuda_chunk &chunk, int pieces, int64_t c, int piece,
               int64_t tap, int64_t i) {
  const int64_t group_in = call.p.in_channels / call.p.groups, g = c / group_in,
                rest = c % group_in;
  if (chunk.order == DCN_ROWS)
    return (((g * chunk.count + i) * pieces + piece) * call.taps() + tap) * group_in + rest;
  return (((g * pieces + piece) * group_in + rest) * call.taps() + tap) * chunk.count + i;
}

/* Every pass over one chunk of a call. */
void run_chunk(const Call &call, const dcn_cuda_chunk &chunk, const dcn_cuda_launch &where,
               Random &r) {
  const dcn_params &p = call.p;
  const int dtype = p.dtype, A = arithmetic(dtype);
  const int64_t K = call.taps(), C = p.in_channels, G = p.offset_groups, HW = p.in_h * p.in_w;
  const int64_t plane = call.plane(), images = p.batch - chunk.image;

  const Values all = in_layout(call.input, p.layout, C, HW);
  const Memory input(dtype, Values(all.begin() + chunk.image * C * HW, all.end()));
  const Memory offset(dtype, call.offset), mask(dtype, call.mask), bias(dtype, call.bias);
  const Memory grad_output(dtype, in_layout(call.grad_output, p.layout, p.out_channels, plane));
  const Memory output(call.pixels() * p.out_channels * size_of(dtype));
  const Memory grad_offset(call.offset.size() * size_of(dtype));
  const Memory grad_mask(call.mask.size() * size_of(dtype));
  dcn_tensors t;
  memset(&t, 0, sizeof(t));
  t.input = input.address;
  t.offset = offset.address;
  t.mask = call.has_mask ? mask.address : nullptr;
  t.bias = bias.address;
  t.output = output.address;
  t.grad_output = grad_output.address;
  t.grad_offset = grad_offset.address;
  t.grad_mask = grad_mask.address;

  /* What is expected. */
  const int64_t samples = C * K * chunk.count;
  Values grad_columns(samples), columns(samples), grad_input(images * C * HW);
  for (double &v : grad_columns) v = (double)r.between(-2, 2);
  Values want_offset(call.offset.size(), NOT_A_NUMBER), want_mask(call.mask.size(), NOT_A_NUMBER);
  for (int64_t g = 0; g < G; g++)
    for (int64_t tap = 0; tap < K; tap++)
      for (int64_t i = 0; i < chunk.count; i++) {
        const int64_t pixel = (chunk.first + i) % plane, n = (chunk.first + i) / plane;
        const int64_t at = ((n * G + g) * K + tap) * plane + pixel;
        const int64_t at_y = 2 * (at - pixel) + pixel;
        const double m = rounded(dtype, call.mask[at]);
        const Hat h = hat(call, n, g, tap, pixel);
        double in_mask = 0, in_y = 0, in_x = 0;
        for (int64_t c = g * (C / G); c < (g + 1) * (C / G); c++) {
          double v[4], w[4];
          for (int q = 0; q < 4; q++) {
            v[q] = h.slopes ? pixel_value(call, n, c, h.y + q / 2, h.x + q % 2) : 0;
            w[q] = (q / 2 ? h.ly : 1 - h.ly) * (q % 2 ? h.lx : 1 - h.lx);
          }
          const double s = h.value ? w[0] * v[0] + w[1] * v[1] + w[2] * v[2] + w[3] * v[3] : 0;
          columns[column(call, chunk, 1, c, 0, tap, i)] = h.nan ? NOT_A_NUMBER : m * s;
          const double up = grad_columns[column(call, chunk, 1, c, 0, tap, i)];
          in_mask += up * s;
          if (h.slopes) {
            in_y += up * m * ((1 - h.lx) * (v[2] - v[0]) + h.lx * (v[3] - v[1]));
            in_x += up * m * ((1 - h.ly) * (v[1] - v[0]) + h.ly * (v[3] - v[2]));
          }
          if (!h.value) continue;
          for (int q = 0; q < 4; q++) {
            const int64_t y = h.y + q / 2, x = h.x + q % 2;
            if (y < 0 || x < 0 || y >= p.in_h || x >= p.in_w) continue;
            grad_input[place(p.layout, C, HW, n - chunk.image, c, y * p.in_w + x)] += w[q] * m * up;
          }
        }
        want_mask[at] = h.nan ? NOT_A_NUMBER : in_mask;
        want_offset[at_y] = h.nan ? NOT_A_NUMBER : in_y;
        want_offset[at_y + plane] = h.nan ? NOT_A_NUMBER : in_x;
      }

  /* Samples forward; pieces are added as the product would. */
  auto check_columns = [&](const char *what, const Memory &memory) {
    const Values got = memory.values(dtype);
    Values sums(samples);
    for (int64_t c = 0; c < C; c++)
      for (int64_t tap = 0; tap < K; tap++)
        for (int64_t i = 0; i < chunk.count; i++) {
          double sum = 0;
          for (int piece = 0; piece < chunk.pieces; piece++)
            sum += got[column(call, chunk, chunk.pieces, c, piece, tap, i)];
          sums[column(call, chunk, 1, c, 0, tap, i)] = sum;
        }
    compare(what, chunk.pieces == 2 ? DCN_FLOAT64 : dtype, columns, sums);
  };
  const Memory sampled(samples * chunk.pieces * size_of(dtype));
  check(dcn_cuda_sample(&p, &t, &chunk, &where, sampled.address), "sample");
  check_columns("sample", sampled);

  /* Between tensors and matrices. */
  const int64_t O = p.out_channels, per_group = O / p.groups;
  Values product(O * chunk.count), want_output(call.pixels() * O, NOT_A_NUMBER),
      want_packed(O * chunk.count);
  for (int64_t o = 0; o < O; o++)
    for (int64_t i = 0; i < chunk.count; i++) {
      const int64_t pixel = (chunk.first + i) % plane, n = (chunk.first + i) / plane;
      const double value = (double)r.between(-2000, 2000) / 8;
      product[p.layout == DCN_NHWC ? (o / per_group * chunk.count + i) * per_group + o % per_group
                                   : o * chunk.count + i] = value;
      want_output[place(p.layout, O, plane, n, o, pixel)] = value + call.bias[o];
      want_packed[o * chunk.count + i] = call.grad_output[(n * O + o) * plane + pixel];
    }
  const Memory products(A, product);
  check(dcn_cuda_finish(&p, &t, &chunk, &where, products.address), "finish");
  compare("finish", dtype, want_output, output.values(dtype));
  if (p.layout == DCN_NCHW) {
    const Memory packed(O * chunk.count * size_of(dtype));
    check(dcn_cuda_pack(&p, &t, &chunk, &where, packed.address), "pack");
    compare("pack", dtype, want_packed, packed.values(dtype));
  }

  /* Backward, by reductions. */
  const Memory upstream(A, grad_columns);
  const Memory again(samples * chunk.pieces * size_of(dtype));
  const Memory sums(A, Values(grad_input.size()));
  check(dcn_cuda_backward(&p, &t, &chunk, &where, upstream.address, again.address, sums.address),
        "backward");
  compare("backward grad_offset", dtype, want_offset, grad_offset.values(dtype));
  compare("backward grad_mask", dtype, want_mask, grad_mask.values(dtype));
  compare("backward grad_input", A, grad_input, sums.values(A));
  check_columns("backward columns", again);

  /* The input's gradient again, sorted. */
  const bool wide = r.chance(50);
  const int64_t entries = 4 * G * K * chunk.count;
  const Memory keys(entries * (wide ? 8 : 4)), weights(entries * size_of(A));
  check(dcn_cuda_keys(&p, &t, &chunk, &where, wide, keys.address, weights.address), "keys");
  std::vector<char> raw = keys.host();
  std::vector<int64_t> key(entries), entry(entries);
  for (int64_t e = 0; e < entries; e++)
    key[e] = wide ? ((const int64_t *)raw.data())[e] : ((const int32_t *)raw.data())[e];
  std::iota(entry.begin(), entry.end(), 0);
  std::stable_sort(entry.begin(), entry.end(),
                   [&](int64_t a, int64_t b) { return key[a] < key[b]; });
  for (int64_t e = 0; e < entries; e++) {
    if (wide)
      ((int64_t *)raw.data())[e] = key[entry[e]];
    else
      ((int32_t *)raw.data())[e] = (int32_t)key[entry[e]];
  }
  const Memory sorted(raw.data(), raw.size()), places(entry.data(), entries * 8);
  const Memory gathered(A, Values(grad_input.size()));
  check(dcn_cuda_gather(&p, &chunk, &where, wide, sorted.address, (const int64_t *)places.address,
                        weights.address, upstream.address, gathered.address),
        "gather");
  compare("gather grad_input", A, grad_input, gathered.values(A));
}

void run(uint64_t seed) {
  Random r(seed);
#if defined(DCN_FLOAT32_ONLY)
  const int dtype = DCN_FLOAT32;
#else
  const int dtype = (int)(seed % 4);
#endif
  const bool rows = seed / 4 % 2 == 0;
  const Call call = random_call(r, dtype, rows);
  const int64_t pixels = call.pixels(), plane = call.plane();
  dcn_cuda_launch where = {nullptr, 0, r.chance(30) ? 1 : 4096};
  const int pieces = size_of(dtype) == 2 && r.chance(70) ? 2 : 1;
  for (int64_t first = 0; first < pixels;) {
    const int64_t count = r.chance(30) ? pixels - first : r.between(1, pixels - first);
    const int64_t image = r.between(0, first / plane);
    const dcn_cuda_chunk chunk = {first, count, image, rows ? DCN_ROWS : DCN_PLANAR, pieces};
    char text[200];
    snprintf(text, sizeof(text), "seed %llu, dtype %d, %s, %s, pixels %lld + %lld, image %lld",
             (unsigned long long)seed, dtype, rows ? "rows" : "planar",
             call.p.layout == DCN_NHWC ? "NHWC" : "NCHW", (long long)first, (long long)count,
             (long long)image);
    configuration = text;
    dcn_emulation_schedule((int)(seed / 8 % 5), seed);
    run_chunk(call, chunk, where, r);
    first += count;
  }
}

/* Memory that is only reserved: 2^31 elements and more. */
struct Reserved {
  char *address = nullptr;
  explicit Reserved(size_t bytes) { check(cudaMalloc((void **)&address, bytes), "cudaMalloc"); }
  Reserved(const Reserved &) = delete;
  Reserved &operator=(const Reserved &) = delete;
  ~Reserved() { cudaFree(address); }

  void write(int64_t index, const std::vector<float> &values) {
    check(cudaMemcpy(address + 4 * index, values.data(), 4 * values.size(), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
  void expect(const char *what, int64_t index, const std::vector<float> &values) const {
    std::vector<float> got(values.size());
    check(cudaMemcpy(got.data(), address + 4 * index, 4 * got.size(), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    compare(what, DCN_FLOAT32, Values(values.begin(), values.end()),
            Values(got.begin(), got.end()));
  }
};

/* One output pixel halfway between the last four pixels of an input of 2^31 values and more. */
void large_input(bool rows, int layout) {
  dcn_params p;
  memset(&p, 0, sizeof(p));
  p.batch = p.out_channels = p.kernel_h = p.kernel_w = p.out_h = p.out_w = 1;
  p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = p.groups = p.offset_groups = 1;
  p.in_channels = 4;
  p.in_h = p.in_w = 23200;
  p.pad_top = -(p.in_h - 2),
  p.pad_left = -(p.in_w - 2); /* the tap stands there without an offset */
  p.dtype = DCN_FLOAT32, p.layout = layout;
  const dcn_cuda_chunk chunk = {0, 1, 0, rows ? DCN_ROWS : DCN_PLANAR, 1};
  const dcn_cuda_launch where = {nullptr, 0, 4096};
  const int64_t HW = p.in_h * p.in_w;
  Reserved input(16 * HW), grad_input(16 * HW);
  Reserved offset(8), mask(4), columns(16), upstream(16), grad_offset(8), grad_mask(4);
  Reserved keys(32), weights(16), entries(32);
  offset.write(0, {0.5f, 0.5f});
  mask.write(0, {0.5f});
  upstream.write(0, {1, 2, 3, 4});
  for (int q = 0; q < 4; q++)
    for (int c = 0; c < 4; c++) {
      const int64_t pixel = (p.in_h - 2 + q / 2) * p.in_w + p.in_w - 2 + q % 2;
      input.write(place(layout, 4, HW, 0, c, pixel), {(float)(4 * q + c)});
      grad_input.write(place(layout, 4, HW, 0, c, pixel), {0});
    }
  dcn_tensors t;
  memset(&t, 0, sizeof(t));
  t.input = input.address, t.offset = offset.address, t.mask = mask.address;
  t.grad_offset = grad_offset.address, t.grad_mask = grad_mask.address;
  check(dcn_cuda_sample(&p, &t, &chunk, &where, columns.address), "sample");
  columns.expect("sample", 0, {3, 3.5f, 4, 4.5f});
  check(dcn_cuda_backward(&p, &t, &chunk, &where, upstream.address, columns.address,
                          grad_input.address),
        "backward");
  grad_mask.expect("grad_mask", 0, {6 * 1 + 7 * 2 + 8 * 3 + 9 * 4});
  grad_offset.expect("grad_offset", 0, {0.5f * 10 * 8, 0.5f * 10 * 4});
  check(dcn_cuda_keys(&p, &t, &chunk, &where, 1, keys.address, weights.address), "keys");
  const std::vector<int64_t> order = {0, 1, 2, 3}; /* the corners ascend already */
  check(cudaMemcpy(entries.address, order.data(), 32, cudaMemcpyHostToDevice), "cudaMemcpy");
  check(dcn_cuda_gather(&p, &chunk, &where, 1, keys.address, (const int64_t *)entries.address,
                        weights.address, upstream.address, grad_input.address),
        "gather");
  for (int q = 0; q < 4; q++)
    for (int c = 0; c < 4; c++) {
      const int64_t pixel = (p.in_h - 2 + q / 2) * p.in_w + p.in_w - 2 + q % 2;
      /* once by reductions, once by the list: 2 * weight 1/4 * mask 1/2 * upstream */
      grad_input.expect("grad_input", place(layout, 4, HW, 0, c, pixel), {0.25f * (float)(c + 1)});
    }
}

/* The last pixels of outputs with 2^31 values and more. */
void large_output(bool rows, int layout) {
  dcn_params p;
  memset(&p, 0, sizeof(p));
  p.kernel_h = p.kernel_w = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.groups = p.offset_groups = 1;
  p.batch = 3, p.in_channels = 4, p.out_channels = 3;
  p.in_h = p.in_w = 1;
  p.out_h = p.out_w = 27000;
  p.pad_top = p.out_h - 1,
  p.pad_left = p.out_w - 1; /* the last pixel of each image reads the one there is */
  p.dtype = DCN_FLOAT32, p.layout = layout;
  const int64_t plane = p.out_h * p.out_w, pixels = 3 * plane;
  const dcn_cuda_chunk chunk = {pixels - 1, 1, 2, rows ? DCN_ROWS : DCN_PLANAR, 1};
  const dcn_cuda_launch where = {nullptr, 0, 4096};
  Reserved offset(8 * pixels), grad_offset(8 * pixels), output(12 * pixels);
  Reserved input(16), columns(16), upstream(16), product(12), packed(12);
  offset.write(5 * plane - 1, {0.25f});
  offset.write(6 * plane - 1, {0.5f});
  input.write(0, {8, 16, 24, 32});
  upstream.write(0, {1, 1, 1, 1});
  product.write(0, {1, 2, 3});
  dcn_tensors t;
  memset(&t, 0, sizeof(t));
  t.input = input.address, t.offset = offset.address, t.output = output.address;
  t.grad_output = output.address, t.grad_offset = grad_offset.address;
  check(dcn_cuda_sample(&p, &t, &chunk, &where, columns.address), "sample");
  columns.expect("sample", 0, {3, 6, 9, 12});
  check(dcn_cuda_backward(&p, &t, &chunk, &where, upstream.address, nullptr, nullptr), "backward");
  grad_offset.expect("grad_offset y", 5 * plane - 1, {-40});
  grad_offset.expect("grad_offset x", 6 * plane - 1, {-60});
  check(dcn_cuda_finish(&p, &t, &chunk, &where, product.address), "finish");
  for (int o = 0; o < 3; o++)
    output.expect("finish", place(layout, 3, plane, 2, o, plane - 1), {(float)(o + 1)});
  if (layout == DCN_NCHW) {
    check(dcn_cuda_pack(&p, &t, &chunk, &where, packed.address), "pack");
    packed.expect("pack", 0, {1, 2, 3});
  }
}

void run_large() {
  for (const bool rows : {false, true})
    for (const int layout : {DCN_NCHW, DCN_NHWC}) {
      if (rows && layout == DCN_NCHW) continue;
      configuration = std::string("large, ") + (rows ? "rows" : "planar") +
                      (layout == DCN_NHWC ? ", NHWC" : ", NCHW");
      large_input(rows, layout);
      large_output(rows, layout);
    }
}

}  // namespace

int main(int argc, char **argv) {
  setvbuf(stdout, nullptr, _IOLBF, 1 << 16); /* what was found is out before a crash */
  if (argc > 1 && !strcmp(argv[1], "large")) {
    run_large();
    printf("selftest: indices beyond 2^31, %d failures\n", failures);
    return failures ? 1 : 0;
  }
  const int count = argc > 1 ? atoi(argv[1]) : 200;
  const int first = argc > 2 ? atoi(argv[2]) : 0;
  for (int seed = first; seed < first + count && failures < 5; seed++) run((uint64_t)seed);
  printf("selftest: %d configurations, %d failures\n", count, failures);
  return failures ? 1 : 0;
}
