// PyTorch's large CPU tensors in one region of addresses: best fit, neighbouring holes merged, and
// nothing ever returned to the system. The C library would mix them with small objects, which keep
// holes apart, and asks for a little more than an aligned tensor's size, so that the hole of one
// does not take its successor: 50 to 200 MB of 2.6 GB in a 124M model's step of 1,024 tokens.
// The region is in huge pages where the system has them.

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <pthread.h>
#include <sys/mman.h>

#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

constexpr size_t LARGE = 1 << 17;  // bytes; smaller tensors are the C library's
constexpr size_t ALIGNMENT = 64;

class Region {
  public:
    Region(char* start, size_t size) : start(start), limit(start + size), end(start) {}

    bool owns(const void* p) const { return p >= start && p < limit; }

    // Null where the region has no room.
    char* take(size_t size) {
        size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        std::lock_guard<std::mutex> lock(mutex);
        auto best = by_size.lower_bound({size, nullptr});
        if (best == by_size.end()) {
            if (!extend(size)) return nullptr;
            best = by_size.lower_bound({size, nullptr});
        }
        auto [found, at] = *best;
        remove(holes.find(at));
        if (found > size) add(at + size, found - size);
        taken[at] = size;
        return at;
    }

    void give(char* at) {
        std::lock_guard<std::mutex> lock(mutex);
        auto entry = taken.find(at);
        size_t size = entry->second;
        taken.erase(entry);
        auto next = holes.lower_bound(at);
        if (next != holes.end() && at + size == next->first) {
            size += next->second;
            next = remove(next);
        }
        if (next != holes.begin()) {
            auto before = std::prev(next);
            if (before->first + before->second == at) {
                at = before->first;
                size += before->second;
                remove(before);
            }
        }
        add(at, size);
    }

    std::mutex mutex;

  private:
    using Holes = std::map<char*, size_t>;

    void add(char* at, size_t size) {
        holes[at] = size;
        by_size.insert({size, at});
    }

    Holes::iterator remove(Holes::iterator hole) {
        by_size.erase({hole->second, hole->first});
        return holes.erase(hole);
    }

    // Make a hole of a size at the end; one that is there already grows.
    bool extend(size_t size) {
        char* at = end;
        auto last = holes.empty() ? holes.end() : std::prev(holes.end());
        bool grows = last != holes.end() && last->first + last->second == end;
        if (grows) at = last->first;
        if (size > (size_t)(limit - at)) return false;
        if (grows) remove(last);
        add(at, size);
        end = at + size;
        return true;
    }

    char *const start, *const limit, *end;       // `end` of all that was ever taken
    Holes holes;                                 // sizes by address
    std::set<std::pair<size_t, char*>> by_size;  // the same; of one size the lowest first
    std::unordered_map<char*, size_t> taken;
};

Region* region;  // lives as long as the process: tensors may outlive everything else

void release(void* p) {
    if (region->owns(p))
        region->give((char*)p);
    else
        c10::free_cpu(p);
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        void* p = size >= LARGE ? region->take(size) : nullptr;
        if (!p) p = c10::alloc_cpu(size);  // PyTorch's own, with its error message
        return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }

    void copy_data(void* to, const void* from, size_t size) const override {
        default_copy_data(to, from, size);
    }
};

}  // namespace

// Reserve `size` bytes of addresses and take tensors from there from now on; 0 where the system or
// PyTorch refuses. Further calls change nothing.
extern "C" int install(size_t size) {
    if (region) return 1;
    void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return 0;
    madvise(start, size, MADV_HUGEPAGE);
    region = new Region((char*)start, size);
    auto lock = [] { region->mutex.lock(); };
    auto unlock = [] { region->mutex.unlock(); };
    pthread_atfork(lock, unlock, unlock);  // a child must not inherit it locked by another thread
    auto* allocator = new Allocator;
    c10::SetCPUAllocator(allocator, 1);
    return c10::GetCPUAllocator() == allocator;
}
