#include "sys/thread_pool.h"
