-- positions.lua: where rooms stand, hundreds per call.
--
-- KEYS: seq of each room
-- Reply: per room its position (see lib.lua), '' where Redis knows nothing of it.

local reply = redis.call('MGET', unpack(KEYS))
for i = 1, #KEYS do
  reply[i] = reply[i] or ''
end
return reply
