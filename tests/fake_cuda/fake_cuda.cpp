// A stand-in for libcuda on machines without a GPU: the part of the driver API that this project uses, over shared host
// memory. For tests alone; what it is true to, and what not, is in README.md beside it.
//
// "Device memory" is a memfd. Its device pointer is an address that nothing may touch (PROT_NONE), so that a process
// that dereferences one dies, as with a GPU; copies go through a second mapping. Streams are threads that work late, so
// that a missing wait shows as wrong bytes. What processes share (who holds which allocation, events, counters) is in
// the file `state` of the folder PD_FAKE_CUDA_DIR.

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

using Status = int;
using DevicePointer = uint64_t;

enum : Status {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, DEVICE_UNAVAILABLE = 46, NO_DEVICE = 100,
  INVALID_DEVICE = 101, INVALID_CONTEXT = 201, PEER_ACCESS_UNSUPPORTED = 217, OPERATING_SYSTEM = 304,
  INVALID_HANDLE = 400, NOT_READY = 600, HOST_MEMORY_ALREADY_REGISTERED = 712, HOST_MEMORY_NOT_REGISTERED = 713,
  UNKNOWN = 999,
};

namespace {

// ---- the environment ----------------------------------------------------------------------------------------------

const char *text_of(const char *name) {
  const char *value = getenv(name);
  return value ? value : "";
}

uint64_t number_of(const char *name, uint64_t otherwise) {
  const char *value = getenv(name);
  return value && *value ? strtoull(value, nullptr, 10) : otherwise;
}

bool has_fault(const char *fault) {
  std::stringstream faults(text_of("PD_FAKE_CUDA_FAULTS"));
  for (std::string one; std::getline(faults, one, ',');)
    if (one == fault) return true;
  return false;
}

std::string folder() { return text_of("PD_FAKE_CUDA_DIR"); }

// A GPU that falls off the bus: for all processes, from the moment that this file exists.
bool is_lost() { return access((folder() + "/lost").c_str(), F_OK) == 0; }

// The physical devices that this process sees, in its order.
std::vector<int> visible_devices() {
  int count = has_fault("no_device") ? 0 : int(number_of("PD_FAKE_CUDA_DEVICES", 1));
  std::vector<int> devices;
  const char *chosen = getenv("CUDA_VISIBLE_DEVICES");
  if (!chosen) {
    for (int device = 0; device < count; device++) devices.push_back(device);
    return devices;
  }
  std::stringstream list(chosen);
  for (std::string one; std::getline(list, one, ',');) {
    int device = atoi(one.c_str());
    if (device >= 0 && device < count) devices.push_back(device);
  }
  return devices;
}

// ---- what processes share -----------------------------------------------------------------------------------------

enum Kind { HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, PEER_TO_PEER, KINDS };

struct Holding {
  uint64_t allocation, bytes, started;
  int pid, device;
};

struct SharedEvent {
  std::atomic<uint64_t> recorded, done;
  std::atomic<uint32_t> used;
};

constexpr int HOLDINGS = 4096, EVENTS = 8192;

struct State {
  std::atomic<uint64_t> next_allocation;
  std::atomic<uint64_t> copies[KINDS], bytes[KINDS];
  // Uses of the API that corrupt memory on a GPU: a mapping closed, or host memory unregistered, under a copy.
  std::atomic<uint64_t> violations;
  Holding holdings[HOLDINGS];
  SharedEvent events[EVENTS];
};

// When a process started, to tell it from a later one with its number; 0 when it has ended.
uint64_t started(int pid) {
  std::string path = "/proc/" + std::to_string(pid) + "/stat";
  FILE *file = fopen(path.c_str(), "r");
  if (!file) return 0;
  char line[2048] = {};
  size_t length = fread(line, 1, sizeof line - 1, file);
  fclose(file);
  line[length] = 0;
  char *rest = strrchr(line, ')');
  if (!rest || rest[2] == 'Z' || rest[2] == 'X') return 0;
  std::stringstream words(rest + 2);
  std::string word;
  for (int field = 3; field <= 22; field++) words >> word;
  return strtoull(word.c_str(), nullptr, 10);
}

struct Shared {
  int file = -1;
  State *state = nullptr;
  std::mutex mutex;

  bool open() {
    std::string path = folder() + "/state";
    file = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof(State)) != 0) return false;
    void *mapped = mmap(nullptr, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED) return false;
    state = static_cast<State *>(mapped);
    return true;
  }

  template <typename Body> auto locked(Body body) {
    std::lock_guard<std::mutex> guard(mutex);
    flock(file, LOCK_EX);
    auto result = body();
    flock(file, LOCK_UN);
    return result;
  }

  // Counts what living processes hold, each allocation once however many have it open.
  uint64_t used(int device) {
    std::set<uint64_t> seen;
    uint64_t bytes = 0;
    for (Holding &holding : state->holdings) {
      if (!holding.pid) continue;
      if (started(holding.pid) != holding.started) holding = {};
      else if (holding.device == device && seen.insert(holding.allocation).second) bytes += holding.bytes;
    }
    return bytes;
  }

  Status hold(uint64_t allocation, uint64_t bytes, int device) {
    for (Holding &holding : state->holdings)
      if (!holding.pid) {
        holding = {allocation, bytes, started(getpid()), getpid(), device};
        return SUCCESS;
      }
    return OUT_OF_MEMORY;
  }

  void let_go(uint64_t allocation) {
    locked([&] {
      for (Holding &holding : state->holdings)
        if (holding.pid == getpid() && holding.allocation == allocation) {
          holding = {};
          break;
        }
      return 0;
    });
  }
};

// Never destroyed: streams' threads use it until the process has gone.
Shared &shared = *new Shared;

uint64_t total_bytes() { return number_of("PD_FAKE_CUDA_TOTAL_BYTES", 1ull << 30); }

// ---- memory -------------------------------------------------------------------------------------------------------

struct Allocation {
  DevicePointer base = 0;
  uint64_t bytes = 0, id = 0;
  unsigned char *alias = nullptr;
  int device = 0, file = -1, opens = 0;
  bool ours = false;
  std::atomic<int> in_use{0};

  ~Allocation() {
    munmap(alias, bytes);
    munmap(reinterpret_cast<void *>(base), bytes);
    if (file >= 0) close(file);
  }
};

using Held = std::shared_ptr<Allocation>;

std::mutex &memory_mutex = *new std::mutex;
std::map<DevicePointer, Held> &allocations = *new std::map<DevicePointer, Held>;
std::map<uint64_t, uint64_t> &registered = *new std::map<uint64_t, uint64_t>;

bool map_both(Allocation &allocation, int file) {
  void *pointer = mmap(nullptr, allocation.bytes, PROT_NONE, MAP_SHARED, file, 0);
  void *alias = mmap(nullptr, allocation.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (pointer == MAP_FAILED || alias == MAP_FAILED) return false;
  allocation.base = reinterpret_cast<DevicePointer>(pointer);
  allocation.alias = static_cast<unsigned char *>(alias);
  return true;
}

// The allocation that has all these bytes; none for a host pointer, or one that leaves its allocation.
Held find(DevicePointer pointer, uint64_t bytes) {
  std::lock_guard<std::mutex> guard(memory_mutex);
  auto after = allocations.upper_bound(pointer);
  if (after == allocations.begin()) return nullptr;
  Held &held = std::prev(after)->second;
  uint64_t offset = pointer - held->base;
  return offset < held->bytes && bytes <= held->bytes - offset ? held : nullptr;
}

bool is_registered(const void *pointer, uint64_t bytes) {
  std::lock_guard<std::mutex> guard(memory_mutex);
  uint64_t start = reinterpret_cast<uint64_t>(pointer);
  auto after = registered.upper_bound(start);
  if (after == registered.begin()) return false;
  auto range = std::prev(after);
  return start + bytes <= range->first + range->second;
}

// A range of which some is registered, and not all of it at once: the driver copies inside one registration.
bool is_registered_in_part(const void *pointer, uint64_t bytes) {
  if (is_registered(pointer, bytes)) return false;
  std::lock_guard<std::mutex> guard(memory_mutex);
  uint64_t start = reinterpret_cast<uint64_t>(pointer);
  auto range = registered.lower_bound(start + bytes);
  if (range == registered.begin()) return false;
  --range;
  return range->first + range->second > start;
}

// ---- streams ------------------------------------------------------------------------------------------------------

struct Stream {
  int device = 0;
  bool blocking = true;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  uint64_t queued = 0, done = 0;
  bool running = false, ended = false;

  uint64_t push(std::function<void()> work) {
    std::lock_guard<std::mutex> guard(mutex);
    queue.push_back(std::move(work));
    if (!running) {
      running = true;
      std::thread([this] { run(); }).detach();
    }
    changed.notify_all();
    return ++queued;
  }

  void wait(uint64_t until) {
    std::unique_lock<std::mutex> guard(mutex);
    changed.wait(guard, [&] { return done >= until; });
  }

  void wait_all() {
    uint64_t until;
    {
      std::lock_guard<std::mutex> guard(mutex);
      until = queued;
    }
    wait(until);
  }

  void run() {
    auto delay = std::chrono::microseconds(number_of("PD_FAKE_CUDA_DELAY_US", 200));
    std::unique_lock<std::mutex> guard(mutex);
    for (;;) {
      changed.wait(guard, [&] { return !queue.empty() || ended; });
      if (queue.empty()) return;
      auto work = std::move(queue.front());
      queue.pop_front();
      guard.unlock();
      std::this_thread::sleep_for(delay);
      work();
      work = nullptr;
      guard.lock();
      done++;
      changed.notify_all();
    }
  }
};

struct Context {
  int device = 0;  // physical
  Stream null_stream;
};

std::mutex &streams_mutex = *new std::mutex;
std::set<Stream *> &streams = *new std::set<Stream *>;
std::map<int, Context *> &contexts = *new std::map<int, Context *>;
thread_local Context *current = nullptr;

// Puts work on a stream. The null stream waits for all blocking streams of its device, and they wait for it.
uint64_t enqueue(Stream *given, std::function<void()> work) {
  Stream *stream = given ? given : &current->null_stream;
  std::vector<std::pair<Stream *, uint64_t>> before;
  auto note = [&](Stream *other) {
    std::lock_guard<std::mutex> guard(other->mutex);
    before.emplace_back(other, other->queued);
  };
  {
    std::lock_guard<std::mutex> guard(streams_mutex);
    if (!given) {
      for (Stream *other : streams)
        if (other->blocking && other->device == current->device) note(other);
    } else if (given->blocking) {
      note(&contexts[given->device]->null_stream);
    }
  }
  return stream->push([before, work = std::move(work)] {
    for (auto &[other, until] : before) other->wait(until);
    work();
  });
}

void synchronize_device(int device) {
  std::vector<Stream *> all;
  {
    std::lock_guard<std::mutex> guard(streams_mutex);
    for (Stream *stream : streams)
      if (stream->device == device) all.push_back(stream);
    all.push_back(&contexts[device]->null_stream);
  }
  for (Stream *stream : all) stream->wait_all();
}

// ---- events -------------------------------------------------------------------------------------------------------

struct Event {
  SharedEvent *record;
  int index;  // in the shared table; -1: this process's own
  bool ours;
};

// ---- handles that travel ------------------------------------------------------------------------------------------

struct MemoryHandle {
  uint32_t magic;
  int pid, file, device;
  uint64_t inode, id, bytes;
  char rest[64 - 40];
};

struct EventHandle {
  uint32_t magic;
  int pid, index;
  char rest[64 - 12];
};

static_assert(sizeof(MemoryHandle) == 64 && sizeof(EventHandle) == 64);
constexpr uint32_t MEMORY_MAGIC = 0x6d656d31, EVENT_MAGIC = 0x65766e31;

// ---- copies -------------------------------------------------------------------------------------------------------

// In pieces, so that somebody who looks too early sees some of the bytes.
void copy_slowly(unsigned char *to, const unsigned char *from, uint64_t bytes) {
  constexpr uint64_t PIECE = 64 * 1024;
  for (uint64_t at = 0; at < bytes; at += PIECE) {
    memmove(to + at, from + at, std::min(PIECE, bytes - at));
    if (at + PIECE < bytes) std::this_thread::yield();
  }
}

void count(Kind kind, uint64_t bytes) {
  shared.state->copies[kind]++;
  shared.state->bytes[kind] += bytes;
}

struct Use {
  Held held;
  explicit Use(Held held) : held(std::move(held)) { this->held->in_use++; }
  Use(const Use &other) : Use(other.held) {}
  ~Use() { held->in_use--; }
};

Status ready() {
  if (!shared.state) return NOT_INITIALIZED;
  if (is_lost()) return DEVICE_UNAVAILABLE;
  return SUCCESS;
}

Status ready_with_context() {
  Status status = ready();
  if (status != SUCCESS) return status;
  return current ? SUCCESS : INVALID_CONTEXT;
}

#define CHECK(status) \
  if (Status seen = (status)) return seen

Status copy_device(DevicePointer to, DevicePointer from, uint64_t bytes, Stream *stream) {
  Held target = find(to, bytes), source = find(from, bytes);
  if (!target || !source) return INVALID_VALUE;
  unsigned char *target_bytes = target->alias + (to - target->base);
  unsigned char *source_bytes = source->alias + (from - source->base);
  count(target->device == source->device ? DEVICE_TO_DEVICE : PEER_TO_PEER, bytes);
  enqueue(stream, [=, target = Use(target), source = Use(source)] { copy_slowly(target_bytes, source_bytes, bytes); });
  return SUCCESS;
}

Status copy_in(DevicePointer to, const void *from, uint64_t bytes, Stream *stream, bool wait) {
  Held target = find(to, bytes);
  if (!target || find(reinterpret_cast<DevicePointer>(from), 0)) return INVALID_VALUE;
  unsigned char *target_bytes = target->alias + (to - target->base);
  count(HOST_TO_DEVICE, bytes);
  auto *host = static_cast<const unsigned char *>(from);
  // Pageable memory is taken before the call returns; registered memory is read when its turn comes.
  auto staged = is_registered(from, bytes) ? nullptr : std::make_shared<std::vector<unsigned char>>(host, host + bytes);
  uint64_t turn = enqueue(stream, [=, target = Use(target)] {
    copy_slowly(target_bytes, staged ? staged->data() : host, bytes);
  });
  if (wait) (stream ? stream : &current->null_stream)->wait(turn);
  return SUCCESS;
}

Status copy_out(void *to, DevicePointer from, uint64_t bytes, Stream *stream, bool wait) {
  Held source = find(from, bytes);
  if (!source || find(reinterpret_cast<DevicePointer>(to), 0)) return INVALID_VALUE;
  if (is_registered_in_part(to, bytes)) return INVALID_VALUE;
  unsigned char *source_bytes = source->alias + (from - source->base);
  count(DEVICE_TO_HOST, bytes);
  uint64_t turn = enqueue(stream, [=, source = Use(source)] {
    copy_slowly(static_cast<unsigned char *>(to), source_bytes, bytes);
  });
  if (wait || !is_registered(to, bytes)) (stream ? stream : &current->null_stream)->wait(turn);
  return SUCCESS;
}

Status fill(DevicePointer to, unsigned char byte, uint64_t bytes, Stream *stream) {
  Held target = find(to, bytes);
  if (!target) return INVALID_VALUE;
  unsigned char *target_bytes = target->alias + (to - target->base);
  enqueue(stream, [=, target = Use(target)] { memset(target_bytes, byte, bytes); });
  return SUCCESS;
}

const char *name_of(Status status) {
  switch (status) {
    case SUCCESS: return "CUDA_SUCCESS";
    case INVALID_VALUE: return "CUDA_ERROR_INVALID_VALUE";
    case OUT_OF_MEMORY: return "CUDA_ERROR_OUT_OF_MEMORY";
    case NOT_INITIALIZED: return "CUDA_ERROR_NOT_INITIALIZED";
    case DEVICE_UNAVAILABLE: return "CUDA_ERROR_DEVICE_UNAVAILABLE";
    case NO_DEVICE: return "CUDA_ERROR_NO_DEVICE";
    case INVALID_DEVICE: return "CUDA_ERROR_INVALID_DEVICE";
    case INVALID_CONTEXT: return "CUDA_ERROR_INVALID_CONTEXT";
    case PEER_ACCESS_UNSUPPORTED: return "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED";
    case OPERATING_SYSTEM: return "CUDA_ERROR_OPERATING_SYSTEM";
    case INVALID_HANDLE: return "CUDA_ERROR_INVALID_HANDLE";
    case NOT_READY: return "CUDA_ERROR_NOT_READY";
    case HOST_MEMORY_ALREADY_REGISTERED: return "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED";
    case HOST_MEMORY_NOT_REGISTERED: return "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED";
    default: return "CUDA_ERROR_UNKNOWN";
  }
}

}  // namespace

// ---- the driver and its devices -----------------------------------------------------------------------------------

API Status cuInit(unsigned) {
  if (uint64_t status = number_of("PD_FAKE_CUDA_INIT", 0)) return Status(status);
  if (folder().empty()) {
    fprintf(stderr, "the stand-in for libcuda needs PD_FAKE_CUDA_DIR, a folder for its state\n");
    return UNKNOWN;
  }
  std::lock_guard<std::mutex> guard(streams_mutex);
  if (!shared.state && !shared.open()) return OPERATING_SYSTEM;
  return visible_devices().empty() ? NO_DEVICE : SUCCESS;
}

API Status cuDriverGetVersion(int *version) {
  *version = 12080;
  return SUCCESS;
}

API Status cuGetErrorName(Status status, const char **name) {
  *name = name_of(status);
  return SUCCESS;
}

API Status cuGetErrorString(Status status, const char **text) { return cuGetErrorName(status, text); }

API Status cuDeviceGetCount(int *count) {
  CHECK(ready());
  *count = int(visible_devices().size());
  return SUCCESS;
}

API Status cuDeviceGet(int *device, int ordinal) {
  CHECK(ready());
  if (ordinal < 0 || size_t(ordinal) >= visible_devices().size()) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

API Status cuDeviceGetName(char *name, int length, int device) {
  CHECK(ready());
  snprintf(name, size_t(length), "stand-in GPU %d", visible_devices().at(size_t(device)));
  return SUCCESS;
}

API Status cuDeviceGetUuid_v2(char *uuid, int device) {
  CHECK(ready());
  memset(uuid, 0xa0, 16);
  uuid[15] = char(visible_devices().at(size_t(device)));
  return SUCCESS;
}

API Status cuDeviceCanAccessPeer(int *can, int device, int peer) {
  CHECK(ready());
  *can = device != peer && !has_fault("no_peer_access");
  return SUCCESS;
}

API Status cuDevicePrimaryCtxRetain(Context **context, int device) {
  CHECK(ready());
  if (device < 0 || size_t(device) >= visible_devices().size()) return INVALID_DEVICE;
  int physical = visible_devices()[size_t(device)];
  std::lock_guard<std::mutex> guard(streams_mutex);
  Context *&known = contexts[physical];
  if (!known) {
    known = new Context;
    known->device = known->null_stream.device = physical;
  }
  *context = known;
  return SUCCESS;
}

API Status cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }

API Status cuCtxSetCurrent(Context *context) {
  CHECK(ready());
  current = context;
  return SUCCESS;
}

API Status cuCtxGetCurrent(Context **context) {
  CHECK(ready());
  *context = current;
  return SUCCESS;
}

API Status cuCtxSynchronize() {
  CHECK(ready_with_context());
  synchronize_device(current->device);
  return SUCCESS;
}

// ---- memory -------------------------------------------------------------------------------------------------------

API Status cuMemGetInfo_v2(size_t *free, size_t *total) {
  CHECK(ready_with_context());
  *total = total_bytes();
  *free = *total - shared.locked([&] { return shared.used(current->device); });
  return SUCCESS;
}

API Status cuMemAlloc_v2(DevicePointer *pointer, size_t bytes) {
  CHECK(ready_with_context());
  if (bytes == 0) return INVALID_VALUE;
  // Small allocations share a larger one on a GPU: the pointer is then not where the exported memory begins.
  uint64_t offset = number_of("PD_FAKE_CUDA_OFFSET_BYTES", 0);
  auto allocation = std::make_shared<Allocation>();
  allocation->bytes = offset + bytes;
  allocation->device = current->device;
  allocation->ours = true;
  allocation->id = ++shared.state->next_allocation;
  CHECK(shared.locked([&] {
    bool fits = shared.used(current->device) + allocation->bytes <= total_bytes();
    return fits ? shared.hold(allocation->id, allocation->bytes, current->device) : Status(OUT_OF_MEMORY);
  }));
  allocation->file = memfd_create("fake-cuda", MFD_CLOEXEC);
  if (allocation->file < 0 || ftruncate(allocation->file, off_t(allocation->bytes)) != 0 ||
      !map_both(*allocation, allocation->file)) {
    shared.let_go(allocation->id);
    return OUT_OF_MEMORY;
  }
  *pointer = allocation->base + offset;
  std::lock_guard<std::mutex> guard(memory_mutex);
  allocations[allocation->base] = allocation;
  return SUCCESS;
}

API Status cuMemFree_v2(DevicePointer pointer) {
  CHECK(ready_with_context());
  Held held = find(pointer, 0);
  if (!held || !held->ours || pointer - held->base != number_of("PD_FAKE_CUDA_OFFSET_BYTES", 0)) return INVALID_VALUE;
  synchronize_device(held->device);
  shared.let_go(held->id);
  std::lock_guard<std::mutex> guard(memory_mutex);
  allocations.erase(held->base);
  return SUCCESS;
}

API Status cuMemGetAddressRange_v2(DevicePointer *base, size_t *bytes, DevicePointer pointer) {
  CHECK(ready_with_context());
  Held held = find(pointer, 0);
  if (!held) return INVALID_VALUE;
  if (base) *base = held->base;
  if (bytes) *bytes = held->bytes;
  return SUCCESS;
}

API Status cuPointerGetAttribute(void *data, int attribute, DevicePointer pointer) {
  CHECK(ready_with_context());
  Held held = find(pointer, 0);
  if (!held) return INVALID_VALUE;
  constexpr int MEMORY_TYPE = 2, DEVICE_ORDINAL = 9, TYPE_DEVICE = 2;
  if (attribute == MEMORY_TYPE) *static_cast<unsigned *>(data) = TYPE_DEVICE;
  else if (attribute == DEVICE_ORDINAL) *static_cast<int *>(data) = held->device;
  else return INVALID_VALUE;
  return SUCCESS;
}

API Status cuMemHostRegister_v2(void *pointer, size_t bytes, unsigned) {
  CHECK(ready_with_context());
  if (has_fault("no_host_register")) return INVALID_VALUE;
  if (is_registered(pointer, bytes)) return HOST_MEMORY_ALREADY_REGISTERED;
  std::lock_guard<std::mutex> guard(memory_mutex);
  registered[reinterpret_cast<uint64_t>(pointer)] = bytes;
  return SUCCESS;
}

API Status cuMemHostUnregister(void *pointer) {
  CHECK(ready_with_context());
  std::lock_guard<std::mutex> guard(memory_mutex);
  return registered.erase(reinterpret_cast<uint64_t>(pointer)) ? SUCCESS : HOST_MEMORY_NOT_REGISTERED;
}

// ---- sharing memory -----------------------------------------------------------------------------------------------

API Status cuIpcGetMemHandle(MemoryHandle *handle, DevicePointer pointer) {
  CHECK(ready_with_context());
  Held held = find(pointer, 0);
  if (!held || !held->ours || has_fault("not_exportable")) return INVALID_VALUE;
  struct stat seen {};
  fstat(held->file, &seen);
  *handle = {};
  handle->magic = MEMORY_MAGIC;
  handle->pid = getpid();
  handle->file = held->file;
  handle->device = held->device;
  handle->inode = seen.st_ino;
  handle->id = held->id;
  handle->bytes = held->bytes;
  return SUCCESS;
}

API Status cuIpcOpenMemHandle_v2(DevicePointer *pointer, MemoryHandle handle, unsigned) {
  CHECK(ready_with_context());
  if (handle.magic != MEMORY_MAGIC) return INVALID_VALUE;
  if (handle.pid == getpid()) return INVALID_CONTEXT;
  auto visible = visible_devices();
  if (std::find(visible.begin(), visible.end(), handle.device) == visible.end()) return INVALID_DEVICE;
  if (handle.device != current->device && has_fault("no_peer_access")) return PEER_ACCESS_UNSUPPORTED;
  {
    // A second opening in one context counts, and is the same mapping.
    std::lock_guard<std::mutex> guard(memory_mutex);
    for (auto &[base, held] : allocations)
      if (!held->ours && held->id == handle.id) {
        held->opens++;
        *pointer = base;
        return SUCCESS;
      }
  }
  std::string path = "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.file);
  int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  struct stat seen {};
  if (file < 0 || fstat(file, &seen) != 0 || seen.st_ino != handle.inode) {
    if (file >= 0) close(file);
    return INVALID_VALUE;
  }
  auto allocation = std::make_shared<Allocation>();
  allocation->bytes = handle.bytes;
  allocation->device = handle.device;
  allocation->id = handle.id;
  allocation->opens = 1;
  bool mapped = map_both(*allocation, file);
  close(file);
  if (!mapped) return OUT_OF_MEMORY;
  CHECK(shared.locked([&] { return shared.hold(handle.id, handle.bytes, handle.device); }));
  *pointer = allocation->base;
  std::lock_guard<std::mutex> guard(memory_mutex);
  allocations[allocation->base] = allocation;
  return SUCCESS;
}

API Status cuIpcCloseMemHandle(DevicePointer pointer) {
  CHECK(ready_with_context());
  Held held = find(pointer, 0);
  if (!held || held->ours || pointer != held->base) return INVALID_VALUE;
  if (--held->opens > 0) return SUCCESS;
  if (held->in_use > 0) {
    shared.state->violations++;
    synchronize_device(held->device);
  }
  shared.let_go(held->id);
  std::lock_guard<std::mutex> guard(memory_mutex);
  allocations.erase(held->base);
  return SUCCESS;
}

// ---- streams and events -------------------------------------------------------------------------------------------

API Status cuStreamCreate(Stream **stream, unsigned flags) {
  CHECK(ready_with_context());
  *stream = new Stream;
  (*stream)->device = current->device;
  (*stream)->blocking = (flags & 1) == 0;
  std::lock_guard<std::mutex> guard(streams_mutex);
  streams.insert(*stream);
  return SUCCESS;
}

API Status cuStreamDestroy_v2(Stream *stream) {
  CHECK(ready_with_context());
  {
    std::lock_guard<std::mutex> guard(streams_mutex);
    if (!streams.erase(stream)) return INVALID_HANDLE;
  }
  // Its work goes on; the object stays for whoever waits for it.
  std::lock_guard<std::mutex> guard(stream->mutex);
  stream->ended = true;
  stream->changed.notify_all();
  return SUCCESS;
}

API Status cuStreamSynchronize(Stream *stream) {
  CHECK(ready_with_context());
  (stream ? stream : &current->null_stream)->wait_all();
  return ready();
}

API Status cuEventCreate(Event **event, unsigned flags) {
  CHECK(ready_with_context());
  constexpr unsigned DISABLE_TIMING = 2, INTERPROCESS = 4;
  if ((flags & INTERPROCESS) && !(flags & DISABLE_TIMING)) return INVALID_VALUE;
  if (!(flags & INTERPROCESS)) {
    *event = new Event{new SharedEvent{}, -1, true};
    return SUCCESS;
  }
  for (int index = 0; index < EVENTS; index++) {
    SharedEvent &one = shared.state->events[index];
    uint32_t unused = 0;
    if (one.used.compare_exchange_strong(unused, 1)) {
      one.recorded = one.done = 0;
      *event = new Event{&one, index, true};
      return SUCCESS;
    }
  }
  return OUT_OF_MEMORY;
}

API Status cuEventDestroy_v2(Event *event) {
  CHECK(ready_with_context());
  // A slot of the shared table is not used again: whoever still has it open would see another's.
  delete event;
  return SUCCESS;
}

API Status cuIpcGetEventHandle(EventHandle *handle, Event *event) {
  CHECK(ready_with_context());
  if (event->index < 0) return INVALID_HANDLE;
  *handle = {};
  handle->magic = EVENT_MAGIC;
  handle->pid = getpid();
  handle->index = event->index;
  return SUCCESS;
}

API Status cuIpcOpenEventHandle(Event **event, EventHandle handle) {
  CHECK(ready_with_context());
  if (handle.magic != EVENT_MAGIC || handle.index < 0 || handle.index >= EVENTS) return INVALID_VALUE;
  if (handle.pid == getpid()) return INVALID_CONTEXT;
  if (!shared.state->events[handle.index].used) return INVALID_VALUE;
  *event = new Event{&shared.state->events[handle.index], handle.index, false};
  return SUCCESS;
}

API Status cuEventRecord(Event *event, Stream *stream) {
  CHECK(ready_with_context());
  SharedEvent *record = event->record;
  uint64_t turn = ++record->recorded;
  enqueue(stream, [record, turn] {
    if (record->done < turn) record->done = turn;
  });
  return SUCCESS;
}

API Status cuEventQuery(Event *event) {
  CHECK(ready_with_context());
  return event->record->done >= event->record->recorded ? SUCCESS : NOT_READY;
}

API Status cuEventSynchronize(Event *event) {
  CHECK(ready_with_context());
  uint64_t until = event->record->recorded;
  while (event->record->done < until) std::this_thread::sleep_for(std::chrono::microseconds(50));
  return ready();
}

API Status cuStreamWaitEvent(Stream *stream, Event *event, unsigned) {
  CHECK(ready_with_context());
  SharedEvent *record = event->record;
  uint64_t until = record->recorded;
  enqueue(stream, [record, until] {
    while (record->done < until) std::this_thread::sleep_for(std::chrono::microseconds(50));
  });
  return SUCCESS;
}

// ---- copies -------------------------------------------------------------------------------------------------------

API Status cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, size_t bytes, Stream *stream) {
  CHECK(ready_with_context());
  return copy_device(to, from, bytes, stream);
}

// Returns before it has copied, as with a GPU.
API Status cuMemcpyDtoD_v2(DevicePointer to, DevicePointer from, size_t bytes) {
  CHECK(ready_with_context());
  return copy_device(to, from, bytes, nullptr);
}

API Status cuMemcpyHtoDAsync_v2(DevicePointer to, const void *from, size_t bytes, Stream *stream) {
  CHECK(ready_with_context());
  return copy_in(to, from, bytes, stream, false);
}

API Status cuMemcpyHtoD_v2(DevicePointer to, const void *from, size_t bytes) {
  CHECK(ready_with_context());
  return copy_in(to, from, bytes, nullptr, true);
}

API Status cuMemcpyDtoHAsync_v2(void *to, DevicePointer from, size_t bytes, Stream *stream) {
  CHECK(ready_with_context());
  return copy_out(to, from, bytes, stream, false);
}

API Status cuMemcpyDtoH_v2(void *to, DevicePointer from, size_t bytes) {
  CHECK(ready_with_context());
  return copy_out(to, from, bytes, nullptr, true);
}

API Status cuMemsetD8_v2(DevicePointer to, unsigned char byte, size_t bytes) {
  CHECK(ready_with_context());
  return fill(to, byte, bytes, nullptr);
}

API Status cuMemsetD8Async(DevicePointer to, unsigned char byte, size_t bytes, Stream *stream) {
  CHECK(ready_with_context());
  return fill(to, byte, bytes, stream);
}

// ---- for tests ----------------------------------------------------------------------------------------------------

// Copies and bytes by kind (host to device, device to host, on one device, between two), then violations: nine numbers.
API Status fakeCudaCounts(uint64_t *out) {
  CHECK(ready());
  for (int kind = 0; kind < KINDS; kind++) {
    out[2 * kind] = shared.state->copies[kind];
    out[2 * kind + 1] = shared.state->bytes[kind];
  }
  out[8] = shared.state->violations;
  return SUCCESS;
}
