-- fence.lua: fences an incarnation in a bucket. It works if Redis is out of memory too:
-- DEL is not refused then, and neither is the write after it.
--
-- KEYS[1] fence
-- ARGV[1] life of the fence (ms)

redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], 'dead', 'PX', ARGV[1])
return 1
