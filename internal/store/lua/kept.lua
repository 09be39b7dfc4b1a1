-- kept.lua: the end of entries, and kept places. If the connection of an entry ends
-- without having asked to leave, and its user has no other one in the room, the entry
-- may stay for a time: it is handed over to the group. Its record then has the
-- incarnation '~' and says until when and why. The sorted set presence:kept of the
-- bucket lists kept places by their deadlines, with members like those of the index of
-- an owner. The record decides, the set only finds it.
--
-- For some time after a room was rebuilt, the last connection of any user is kept: the
-- server of another connection may not have written it again yet.

local function placeOf(conn, entry)
  return 'e ' .. conn .. ' ' .. entry .. ' ' .. room
end

-- remove ends an existing entry of the current room, with its own keys if it has any.
local function remove(conn, entry, inc, connKey, stateKey, mark, cause, user)
  advance(mark)
  call('HDEL', members, conn)
  if connKey then
    call('DEL', connKey, stateKey)
  end
  sized(-1)
  local kept = inc == KEPT
  if not kept then
    count(inc, -1)
  elseif keptKey then
    try('ZREM', keptKey, placeOf(conn, entry))
  end
  setUser(conn, user, kept)
  publish('L', cause .. figures(user), conn, entry .. inc .. BARE .. seq .. bracketed(user, '0', '') .. '\n' .. user)
end

-- vacate ends the entry of a connection, because another one takes its place (a cause),
-- or it should not be there (its own cause). It returns entry and incarnation.
vacate = function(conn, mark, cause, connKey, stateKey)
  local v = call('HGET', members, conn)
  local id, inc = match(v or '', '^(%S+)( %S+ )')
  if not id then
    return
  end
  local _, stop, _, _, _, _, _, _, _, _, _, _, tail = find(v, REST, #id + #inc + 1)
  if not stop then
    return
  end
  local user, _, _, _, _, own = person(v, stop, tail)
  if not cause and not own then
    return -- it is connected: only a hash that others wrote calls it a place
  end
  remove(conn, id, inc, connKey, stateKey, mark, cause or own, user)
  return id, inc
end

-- alone reports whether a live entry is the only connection of its user in the room, as
-- far as it is known. If a recount that goes on finds another one later, the place ends.
local function alone(conn, user)
  if users then
    return seatOf(user) == '1'
  elseif not cursor then
    return false
  elseif call('SMISMEMBER', recountKey, conn)[1] == 1 then
    return seatOf(user) == '1'
  end
  return not seatOf(user)
end

-- keptUntil returns the time until which the place of a live entry is kept if its
-- connection ends now, or nil. wanted: it did not ask to leave. since is the time from
-- which grace counts, nil: now.
local function keptUntil(conn, user, grace, wanted, since)
  local till = 0
  if wanted and grace ~= '0' then
    till = (since or now) + tonumber(grace)
  end
  if rebuilding and user ~= '' and rebuilding > till then
    till = rebuilding
  end
  if till <= now then
    return nil
  end
  if user ~= '' and not alone(conn, user) then
    return nil
  end
  return string.format('%.0f', till)
end

-- handOver makes a live entry a kept place. v is its record, whose line ends at stop. It
-- returns false if the place cannot be kept, because without the set nobody would end
-- it.
local function handOver(conn, entry, inc, v, stop, till, cause, mark, connKey, stateKey)
  if failed(try('ZADD', keptKey, till, placeOf(conn, entry))) then
    return false
  end
  local _, _, _, _, sl, sv, meta, mv, ml, _, joined, _, tail = find(v, REST, #entry + #inc + 1)
  local user, grace, extra, cut = person(v, stop, tail)
  local more, bytes = bracketed(user, grace, extra), user .. extra
  if sl ~= '0' then
    advance(mark .. '+')
    publish('S', '.' .. figures(user), conn,
      entry .. inc .. '0 0 ' .. sv .. ' . ' .. mv .. ' 0 0 ' .. joined .. ' ' .. seq .. more .. '\n' .. bytes)
  end
  advance(mark)
  if more == '' then
    more = ' 0 0 0'
  end
  local who, since = entry .. KEPT .. '0 0 ' .. sv .. ' . ', '0 ' .. joined .. ' ' .. seq .. more .. ' ' .. till .. ' ' .. cause .. '\n' .. bytes
  call('HSET', members, conn, who .. meta .. since .. sub(v, cut + 1, cut + tonumber(ml)))
  if connKey then
    call('DEL', connKey, stateKey)
  end
  count(inc, -1)
  setUser(conn, user, false, user, true)
  publish('D', cause .. figures(user), conn, who .. mv .. ' 0 ' .. since)
  return true
end
